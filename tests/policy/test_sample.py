from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.data.rows import write_rows
from rlhf.data.samples import read_samples
from rlhf.errors import DataError, RequestError
from rlhf.models.causal import weights_sha256
from rlhf.policy.continuous import Limits
from rlhf.policy.sample import generate, run
from rlhf.policy.settings import SampleSettings, SamplingSettings
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from rlhf.wire.records import Sampling, Stopping
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer


def settings(tmp_path: Path, **sample: object) -> Settings:
    return Settings(
        run=RunSettings(folder=tmp_path, name="r"),
        sampling=SamplingSettings(max_new_tokens=5, temperature=0.8),
        sample=SampleSettings(**{"completions": 3, **sample}),
    )


def test_samples_of_every_prompt_are_written_with_their_metadata(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "r" / "pretrained")
    prompts = tmp_path / "r" / "data" / "prompts.jsonl"
    prompts.parent.mkdir(parents=True)
    rows = [{"prompt": "A fine", "answer": "film"}, {"prompt": "The plot"}, {"prompt": "beyond the limit"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = run(settings(tmp_path, limit=2))
    samples = read_samples(tmp_path / "r" / "samples.jsonl")
    assert [(s.prompt_index, s.prompt, s.metadata) for s in samples] == [
        (0, "A fine", {"answer": "film"}),
        (1, "The plot", {}),
    ]
    assert {len(s.completions) for s in samples} == {3}
    assert {s.version.sha256 for s in samples} == {weights_sha256(folder)}
    assert len({c.seed for s in samples for c in s.completions}) == 6
    assert all(len(c.token_ids) == len(c.logprobs) <= 5 for s in samples for c in s.completions)
    assert (figures["prompts"], figures["completions"]) == (2, 6)
    again = tmp_path / "again.jsonl"
    run(settings(tmp_path, limit=2, out=again))
    assert again.read_text() == (tmp_path / "r" / "samples.jsonl").read_text()


def test_held_out_prompts_are_completed_apart_and_only_on_request(tmp_path: Path) -> None:
    tiny_lm_folder(tmp_path / "r" / "pretrained")
    write_rows(tmp_path / "r" / "data" / "prompts.jsonl", [{"prompt": "A fine"}, {"prompt": "The plot"}])
    heldout = tmp_path / "r" / "data" / "heldout_prompts.jsonl"
    write_rows(heldout, [{"prompt": f"Unseen {n}"} for n in range(5)])
    figures = run(settings(tmp_path, heldout_limit=3))
    written = read_samples(tmp_path / "r" / "heldout_samples.jsonl")
    assert [(s.prompt_index, s.prompt) for s in written] == [(n, f"Unseen {n}") for n in range(3)]
    assert {len(s.completions) for s in written} == {3}
    assert [s.prompt for s in read_samples(tmp_path / "r" / "samples.jsonl")] == ["A fine", "The plot"]
    assert figures["prompts"] == 5
    run(settings(tmp_path))
    assert not (tmp_path / "r" / "heldout_samples.jsonl").exists()


def test_a_bad_row_of_prompts_is_named(tmp_path: Path) -> None:
    tiny_lm_folder(tmp_path / "r" / "pretrained")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"text": "no prompt"}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:2"):
        run(settings(tmp_path, prompts=prompts))


def test_generate_keeps_the_order_and_repeats_itself() -> None:
    model, prompts = tiny_lm(), [np.array([5 + i] * (1 + i % 4), dtype=np.int32) for i in range(12)]
    stopping, sampling = Stopping(6, ignore_eos=True), Sampling(completions=2, seed=2**64 - 3)
    finished: list[None] = []
    crowded = generate(model, tiny_tokenizer(), prompts, sampling, stopping, on_finished=lambda: finished.append(None))
    narrow = generate(model, tiny_tokenizer(), prompts, sampling, stopping, limits=Limits(max_sequences=3))
    assert len(finished) == 24
    for i, (group, same) in enumerate(zip(crowded, narrow, strict=True)):
        assert [(c.prompt_index, c.completion_index) for c in group] == [(i, 0), (i, 1)]
        assert [c.seed for c in group] == [(2**64 - 3 + 2 * i + k) % 2**64 for k in range(2)]
        assert [c.token_ids.tolist() for c in group] == [c.token_ids.tolist() for c in same]


def test_generate_leaves_the_model_as_it_was_and_checks_its_input() -> None:
    model = tiny_lm().train()
    assert generate(model, tiny_tokenizer(), [], Sampling(), Stopping(4)) == []
    assert model.training
    with pytest.raises(RequestError, match="token 280"):
        generate(model, tiny_tokenizer(), [np.array([280], dtype=np.int32)], Sampling(), Stopping(4))
    with pytest.raises(RequestError, match="temperature"):
        generate(model, tiny_tokenizer(), [np.array([5], dtype=np.int32)], Sampling(temperature=-1), Stopping(4))
    assert model.training
