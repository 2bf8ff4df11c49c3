"""New weights in two phases, on the engine alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.errors import DeadlineExceeded, ModelError, TokenizerMismatch, WeightsMismatch
from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.models.weights import WEIGHTS_FILE, write_weights
from rlhf.ops import logprobs_from_logits
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import Finished, GenerationRequest, Requirement
from rlhf.policy.weights import folder_of
from rlhf.wire.records import Sampling, Stopping, VersionSpan, WeightVersion
from support.tiny import tiny_lm, tiny_tokenizer

OLD = WeightVersion("", 0, 0, "0" * 64)
OWN = tokenizer_sha256(tiny_tokenizer())


def engine_of(**limits: int) -> ContinuousEngine:
    # In float64, so that a stale cache shows and rounding does not.
    return ContinuousEngine(tiny_lm().double(), tiny_tokenizer(), OLD, Limits(**limits))


def publish(tmp_path: Path, seed: int = 1, *, step: int = 1, context: int = 64, tokenizer: str = OWN) -> WeightVersion:
    model = tiny_lm(seed=seed, context=context)
    return write_weights(tmp_path / f"0-{step}", model, run_id="r", epoch=0, step=step, tokenizer_sha256=tokenizer)


def request(id: int, new: int = 10, **fields: object) -> GenerationRequest:
    prompt = np.random.default_rng(id).integers(2, 280, 5 + id).astype(np.int32)
    return GenerationRequest(id, prompt, id, Sampling(), Stopping(new, ignore_eos=True), **fields)  # type: ignore[arg-type]


def steps(engine: ContinuousEngine, number: int = 100) -> dict[int, Finished]:
    """Steps until done, at most `number`."""
    finished = {}
    for _ in range(number):
        if not engine.load.running + engine.load.waiting:
            break
        for event in engine.step():
            assert isinstance(event, Finished), event
            finished[event.id] = event
    return finished


def logprobs(seeds: Sequence[tuple[int, int]], asked: GenerationRequest, answer: Finished) -> np.ndarray:
    """Of the whole sequence by one model per stretch: (seed of the model, tokens)."""
    tokens = torch.tensor(np.concatenate([asked.prompt, answer.token_ids]), dtype=torch.int64)
    rows, start = [], len(asked.prompt) - 1
    for seed, count in seeds:
        with torch.no_grad():
            rows.append(tiny_lm(seed=seed).double()(tokens[None]).logits[0, start : start + count])
        start += count
    return logprobs_from_logits(torch.cat(rows), tokens[len(asked.prompt) :]).logprobs.numpy()


def test_in_flight_sequences_finish_on_the_weights_they_began_with(tmp_path: Path) -> None:
    engine = engine_of(max_sequences=2)
    new = publish(tmp_path)
    asked = [request(0), request(1), request(2)]
    engine.submit(asked)
    steps(engine, 4)
    engine.prepare(tmp_path / "0-1", new, 1)
    engine.commit(new, OLD, keep=False)
    assert (engine.versions.current, engine.versions.previous, engine.versions.prepared) == (new, OLD, None)
    answers = steps(engine)
    for id, seed, version in ((0, 0, OLD), (1, 0, OLD), (2, 1, new)):
        assert answers[id].versions == (VersionSpan(version, 0, 10),)
        np.testing.assert_allclose(
            answers[id].logprobs, logprobs([(seed, 10)], asked[id], answers[id]), atol=2e-6, rtol=0
        )


def test_kept_sequences_go_on_with_the_new_weights_and_new_caches(tmp_path: Path) -> None:
    engine = engine_of()
    new = publish(tmp_path)
    asked = [request(0), request(1, 6), request(2, requirement=Requirement(exactly=OLD))]
    engine.submit(asked)
    steps(engine, 4)
    engine.prepare(tmp_path / "0-1", new, 1)
    engine.commit(new, None, keep=True)
    answers = steps(engine)
    assert answers[0].versions == (VersionSpan(OLD, 0, 4), VersionSpan(new, 4, 10))
    assert answers[2].versions == (VersionSpan(OLD, 0, 10),)
    for id, stretches in ((0, [(0, 4), (1, 6)]), (1, [(0, 4), (1, 2)]), (2, [(0, 10)])):
        np.testing.assert_allclose(answers[id].logprobs, logprobs(stretches, asked[id], answers[id]), atol=2e-6, rtol=0)


def test_a_sequence_kept_before_its_first_token_has_one_span(tmp_path: Path) -> None:
    engine = engine_of()
    new = publish(tmp_path)
    engine.submit([request(0)])
    engine._admit()
    engine.prepare(tmp_path / "0-1", new, 1)
    engine.commit(new, None, keep=True)
    assert steps(engine)[0].versions == (VersionSpan(new, 0, 10),)


def test_rollback_brings_the_previous_weights_back(tmp_path: Path) -> None:
    engine = engine_of()
    before = steps_of(engine, request(0))
    new = publish(tmp_path)
    engine.prepare(tmp_path / "0-1", new, 1)
    engine.commit(new, None, keep=False)
    assert steps_of(engine, request(0)).token_ids.tolist() != before.token_ids.tolist()
    engine.rollback(new, keep=False)
    again = steps_of(engine, request(0))
    assert again.token_ids.tolist() == before.token_ids.tolist()
    assert again.versions == (VersionSpan(OLD, 0, 10),)
    with pytest.raises(WeightsMismatch, match="no previous"):
        engine.rollback(None, keep=False)


def steps_of(engine: ContinuousEngine, asked: GenerationRequest) -> Finished:
    engine.submit([asked])
    return steps(engine)[asked.id]


def test_two_modules_take_turns(tmp_path: Path) -> None:
    engine = engine_of()
    models = set()
    for step in range(1, 5):
        new = publish(tmp_path, seed=step, step=step)
        engine.prepare(tmp_path / f"0-{step}", new, 1)
        assert engine.versions.previous is None, "its place is taken"
        engine.commit(new, None, keep=False)
        models.add(id(engine._current.model))
        asked = request(step)
        answer = steps_of(engine, asked)
        np.testing.assert_allclose(answer.logprobs, logprobs([(step, 10)], asked, answer), atol=2e-6, rtol=0)
    assert len(models) == 2


def test_commit_compares_and_repeats_itself_harmlessly(tmp_path: Path) -> None:
    engine = engine_of()
    new = publish(tmp_path)
    with pytest.raises(WeightsMismatch, match="not prepared"):
        engine.commit(new, None, keep=False)
    engine.prepare(tmp_path / "0-1", new, 1)
    engine.prepare(tmp_path / "0-1", new, 1)
    with pytest.raises(WeightsMismatch, match="expected to be current"):
        engine.commit(new, new, keep=False)
    engine.commit(new, OLD, keep=False)
    engine.commit(new, OLD, keep=False)
    assert (engine.versions.current, engine.versions.previous) == (new, OLD)


def flip(tmp_path: Path) -> None:
    file = tmp_path / "0-1" / WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_altered_or_foreign_weights_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    engine = engine_of()
    before = steps_of(engine, request(0))
    kept = publish(tmp_path, step=7)
    engine.prepare(tmp_path / "0-7", kept, 1)
    engine.commit(kept, None, keep=False)
    version = publish(tmp_path)
    flip(tmp_path)
    with pytest.raises(ModelError, match="altered"):
        engine.prepare(tmp_path / "0-1", version, 1)
    other = write_weights(tmp_path / "0-2", tiny_lm("gpt2"), run_id="r", epoch=0, step=2, tokenizer_sha256=OWN)
    with pytest.raises(ModelError, match="do not fit"):
        engine.prepare(tmp_path / "0-2", other, 1)
    with pytest.raises(TokenizerMismatch, match="another tokenizer"):
        engine.prepare(tmp_path / "0-3", publish(tmp_path, step=3, tokenizer="f" * 64), 1)
    spoilt = tiny_lm(seed=1)
    with torch.no_grad():
        next(spoilt.parameters())[3] = torch.nan
    nan = write_weights(tmp_path / "0-4", spoilt, run_id="r", epoch=0, step=4, tokenizer_sha256=OWN)
    with pytest.raises(ModelError, match="not finite"):
        engine.prepare(tmp_path / "0-4", nan, 1)
    assert engine.versions.prepared is None
    engine.rollback(None, keep=False)
    assert steps_of(engine, request(0)).token_ids.tolist() == before.token_ids.tolist()


def test_prepare_does_not_hash_the_tokenizer_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a large vocabulary that stops every other thread, decoding included, for a good part of a second."""
    engine = engine_of()
    version = publish(tmp_path)

    def hashed(_: object) -> str:
        raise AssertionError("the tokenizer was hashed while the engine serves")

    monkeypatch.setattr("rlhf.policy.continuous.tokenizer_sha256", hashed)
    engine.prepare(tmp_path / "0-1", version, 1)
    assert engine.versions.prepared == version


def test_prepare_waits_for_the_place_it_needs(tmp_path: Path) -> None:
    engine = engine_of()
    first, second = publish(tmp_path), publish(tmp_path, seed=2, step=2)
    engine.submit([request(0, new=20)])
    steps(engine, 2)
    engine.prepare(tmp_path / "0-1", first, 1)
    engine.commit(first, None, keep=False)
    with pytest.raises(DeadlineExceeded, match="1 sequences still run"):
        engine.prepare(tmp_path / "0-2", second, 0.05)
    preparing = threading.Thread(target=engine.prepare, args=(tmp_path / "0-2", second, 20))
    preparing.start()
    time.sleep(0.05)
    assert steps(engine)[0].versions == (VersionSpan(OLD, 0, 20),)
    preparing.join(20)
    assert engine.versions.prepared == second


def test_requirements_on_weights() -> None:
    held = WeightVersion("r", 1, 5, "a" * 64)
    for fine in (
        Requirement(),
        Requirement(exactly=held),
        Requirement(exactly=WeightVersion("r", 1, 5, "")),
        Requirement(at_least=WeightVersion("r", 0, 9, "b" * 64)),
    ):
        fine.check(held)
    for unmet in (
        Requirement(exactly=WeightVersion("r", 1, 5, "b" * 64)),
        Requirement(exactly=WeightVersion("r", 1, 4, "")),
        Requirement(at_least=WeightVersion("r", 1, 6, "")),
        Requirement(at_least=WeightVersion("s", 0, 0, "")),
    ):
        with pytest.raises(WeightsMismatch):
            unmet.check(held)


def test_folders_are_named_by_path_or_uri(tmp_path: Path) -> None:
    place = tmp_path / "with space"
    assert folder_of(str(place)) == place
    assert folder_of(place.as_uri()) == place
    with pytest.raises(ModelError, match="s3://"):
        folder_of("s3://bucket/weights")
