from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import DataError
from rlhf.feedback.judgments import CompletionShown, Judgment, write_judgments
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel, ended
from rlhf.models.tokenizer import load_tokenizer
from rlhf.preference import comparisons as comparisons_module
from rlhf.preference import train as training
from rlhf.preference.assemble import raw_scores
from rlhf.preference.comparisons import Numbering, batch_of, by_completions, encode, split_by_prompt
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from support.tiny import tiny_lm_folder, tiny_tokenizer

GOOD, BAD, FILLER = "good", "dull", ("slow", "long", "fine")


def shown(texts: Sequence[str]) -> tuple[CompletionShown, ...]:
    return tuple(CompletionShown(text, policy_version="v") for text in texts)


def judgment(number: int, rng: random.Random, completions: tuple[str, ...] = ()) -> Judgment:
    """The more "good" and the less "dull", the better; ties where it is equal. Length says nothing."""
    words = [rng.choices((GOOD, BAD, *FILLER), k=rng.randint(2, 5)) for _ in range(4)]
    taste = [w.count(GOOD) - w.count(BAD) for w in words]
    ranks = tuple(1 + sum(other > own for other in taste) for own in taste)
    return Judgment(
        judgment_id=f"j{number}",
        task_id=str(number),
        prompt=f"Film {number // 2}:",
        completions=shown(completions or [" " + " ".join(w) for w in words]),
        ranks=ranks,
        annotator="a",
        source="simulated",
    )


def judgments(count: int = 240) -> list[Judgment]:
    rng = random.Random(0)
    return [judgment(number, rng) for number in range(count)]


def tiny_settings(tmp_path: Path, rows: list[Judgment], **changes: Any) -> Settings:
    write_judgments(tmp_path / "comparisons.jsonl", rows)
    tiny_lm_folder(tmp_path / "start")
    section = RewardModelSettings(
        comparisons=tmp_path / "comparisons.jsonl",
        init_from=tmp_path / "start",
        **{"lr": 1e-2, "prompts_per_batch": 4, **changes},
    )
    return Settings(run=RunSettings(folder=tmp_path, name="r"), reward_model=section)


def test_reward_model_learns_the_taste_and_is_normalised_on_its_reference_set(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, judgments(), epochs=3)
    figures = training.run(settings)
    assert figures["reward_model_accuracy"] > 0.9
    assert 0.3 < figures["length_only_accuracy"] < 0.7
    assert figures["nll"] < 0.4
    assert figures["heldout_judgments"] == 24
    assert figures["heldout_pairs"] + figures["heldout_ties"] == 24 * 6
    assert figures["heldout_ties"] > 0
    folder = settings.paths.reward_model
    model, tokenizer = RewardModel.load(folder), load_tokenizer(folder)
    rows = [json.loads(line) for line in (folder / "reference_set.jsonl").read_text().splitlines()]
    assert len(rows) == 512
    sequences = [
        ended(tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id)
        for row in rows
    ]
    with torch.no_grad():
        scores = model(*pad(sequences, 1))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1, abs=1e-4)
    assert {"reference_set_sha256", "comparisons_sha256", "figures"} <= model.facts.keys()
    assert not folder.with_name("reward-model.training").exists()


def test_noise_free_judgments_of_held_out_prompts_give_an_accuracy_of_their_own(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, judgments(), epochs=3)
    upside_down = [replace(each, ranks=tuple(5 - rank for rank in each.ranks)) for each in judgments(40)]
    upside_down = [replace(each, ranks=tuple(r - min(each.ranks) + 1 for r in each.ranks)) for each in upside_down]
    write_judgments(settings.paths.heldout_comparisons, upside_down)
    figures = training.run(settings)
    assert figures["reward_model_accuracy"] > 0.9
    assert figures["noise_free_reward_model_accuracy"] < 0.1
    assert 0.3 < figures["noise_free_length_only_accuracy"] < 0.7
    ordered = sum(a != b for each in upside_down for i, a in enumerate(each.ranks) for b in each.ranks[:i])
    assert figures["noise_free_pairs"] == ordered


def test_noise_free_judgments_that_were_asked_for_must_be_there(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, judgments(), heldout_comparisons=tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        training.run(settings)


def test_interrupted_training_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = judgments(40)
    whole = tiny_settings(tmp_path / "a", rows, checkpoint_every=2)
    training.run(whole)
    settings = tiny_settings(tmp_path / "b", rows, checkpoint_every=2)
    calls: list[int] = []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("killed")
        return rankings_of(*arguments)

    rankings_of = comparisons_module.rankings_of
    with monkeypatch.context() as patch:
        patch.setattr(comparisons_module, "rankings_of", killed)
        with pytest.raises(RuntimeError, match="killed"):
            training.run(settings)
    training.run(settings)
    models = [RewardModel.load(each.paths.reward_model) for each in (whole, settings)]
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    assert (models[0].mean, models[0].std) == (models[1].mean, models[1].std)


def test_judgments_of_one_prompt_stay_on_one_side() -> None:
    comparisons = encode(judgments(100), tiny_tokenizer(), 200, Path("c.jsonl"))
    train, heldout = split_by_prompt(comparisons, 0.2, seed=3)
    assert len(train) + len(heldout) == 100
    assert len({comparison.prompt for comparison in heldout}) == 10
    assert not {comparison.prompt for comparison in train} & {comparison.prompt for comparison in heldout}


def test_each_completion_is_in_the_batch_once_with_one_end_token() -> None:
    comparisons = encode(judgments(3), tiny_tokenizer(), 200, Path("c.jsonl"))
    batch = batch_of(by_completions(comparisons), 1, Numbering.of(comparisons, 1, 0))
    assert batch.input_ids.shape[0] == 3 * 4
    assert batch.rankings.items.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert batch.weight == 9.0
    lengths = batch.attention_mask.sum(1)
    assert (batch.input_ids[torch.arange(12), lengths - 1] == tiny_tokenizer().eos_token_id).all()
    assert ((batch.input_ids == tiny_tokenizer().eos_token_id).sum(1) == 1).all()


def test_completions_that_several_annotators_ranked_are_scored_once() -> None:
    first, second = judgments(2)
    ranked = [first, second, replace(first, judgment_id="j9", annotator="b", ranks=(1, 2, 3, 4))]
    comparisons = encode(ranked, tiny_tokenizer(), 200, Path("c.jsonl"))
    groups = by_completions(comparisons)
    assert [len(group) for group in groups] == [2, 1]
    batch = batch_of(groups, 1, Numbering.of(comparisons, 1, 0))
    assert batch.input_ids.shape[0] == 2 * 4
    assert batch.weight == 9.0
    assert batch.rankings.items.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.rankings.ranks[1].tolist() == [1, 2, 3, 4]
    assert batch.rankings.annotators.tolist() == [0, 1, 0]


def test_completion_that_is_too_long_is_named() -> None:
    rows = judgments(3)
    rows[1] = replace(rows[1], completions=shown([*rows[1].texts[:3], " so slow" * 30]))
    with pytest.raises(DataError, match=r"c\.jsonl:2: prompt and completion of judgment j1 have \d+ tokens, but 60"):
        encode(rows, tiny_tokenizer(), 60, Path("c.jsonl"))


def test_completion_that_fills_the_context_goes_without_an_end_token(tmp_path: Path) -> None:
    rows = judgments(8)
    word = tiny_tokenizer()(" x").input_ids
    room = 64 - len(tiny_tokenizer()(rows[1].prompt).input_ids)
    rows[1] = replace(
        rows[1], completions=shown([" x" * (room // len(word)) + "x" * (room % len(word)), " a", " b", " c"])
    )
    full, short = encode(rows, tiny_tokenizer(), 64, Path("c.jsonl"), context_tokens=64)[1].token_ids[:2]
    assert len(full) == 64
    assert [ids.count(tiny_tokenizer().eos_token_id) for ids in (full, short)] == [0, 1]
    with pytest.raises(DataError, match=r"have 65 tokens, but 64"):
        encode(rows, tiny_tokenizer(), 64, Path("c.jsonl"), context_tokens=128)
    assert training.run(tiny_settings(tmp_path, rows))["train_judgments"] > 0


def test_empty_completion_is_scored_at_its_end_token() -> None:
    row = replace(judgments(1)[0], completions=shown(["", " good", " dull", " fine"]))
    ids = encode([row], tiny_tokenizer(), 60, Path("c.jsonl"))[0].token_ids[0]
    assert ids == [*tiny_tokenizer()("Film 0:").input_ids, tiny_tokenizer().eos_token_id]


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two prompts"):
        training.run(tiny_settings(tmp_path, judgments(2)))


def test_nothing_but_ties_is_refused(tmp_path: Path) -> None:
    rows = [replace(row, ranks=(1, 1, 1, 1)) for row in judgments(8)]
    with pytest.raises(DataError, match="on the training side orders two completions; all are ties"):
        training.run(tiny_settings(tmp_path, rows))


def test_scores_in_batches_are_those_of_each_alone(tmp_path: Path) -> None:
    model = RewardModel.new(tiny_lm_folder(tmp_path / "start"), seed=1)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, 270, int(rng.integers(1, 30))).tolist() for _ in range(150)]
    scores = raw_scores([model], model.head.weight[None], sequences, 1, RewardModelSettings())[:, 0, 0]
    alone = [float(model.raw_scores(*pad([sequence], 1)).detach()) for sequence in sequences]
    np.testing.assert_allclose(scores, alone, rtol=0, atol=1e-5)


def test_end_token_is_put_once() -> None:
    assert ended([3, 4], 0) == ended([3, 4, 0], 0) == [3, 4, 0]
    assert ended([], 0) == [0]
    assert ended(np.array([3], np.int32), 0) == [3, 0]
    assert ended([3], None) == [3]
