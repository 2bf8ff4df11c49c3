"""With `deterministic` a completion is the same to the last bit, whoever shares the engine with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import RequestError, SettingsError
from rlhf.models.causal import new_causal_lm
from rlhf.models.weights import copy_weights, named_weights
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import Finished, GenerationRequest
from rlhf.policy.lane import Lane
from rlhf.sft.settings import PretrainSettings
from rlhf.wire.records import Sampling, Stopping, WeightVersion
from support.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the settings want it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VERSION = WeightVersion("", 0, 0, "0" * 64)


def model(architecture: str) -> Any:
    """Wide enough that sums in another order differ in their last bits."""
    settings = PretrainSettings(
        architecture=architecture, hidden_size=64, layers=2, heads=4, context=96, sequence_length=32
    )
    return new_causal_lm(settings, tiny_tokenizer()).eval()


def engine_of(made: Any, **limits: Any) -> ContinuousEngine:
    return ContinuousEngine(made, tiny_tokenizer(), VERSION, Limits(**{"max_sequences": 12, **limits}))


def request(id: int, length: int, new: int, seed: int = 0) -> GenerationRequest:
    prompt = np.random.default_rng(length).integers(2, 280, length).astype(np.int32)
    return GenerationRequest(id, prompt, seed, Sampling(temperature=0.8), Stopping(new, ignore_eos=True))


def finish(engine: ContinuousEngine) -> dict[int, Finished]:
    found = {}
    while engine.load.running + engine.load.waiting:
        for event in engine.step():
            assert isinstance(event, Finished)
            found[event.id] = event
    return found


def content(finished: Finished) -> tuple[bytes, bytes]:
    assert finished.logprobs is not None
    return finished.token_ids.tobytes(), finished.logprobs.tobytes()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_completion_is_the_same_in_any_company(architecture: str) -> None:
    engine = engine_of(model(architecture), max_batch_tokens=12 * 40, deterministic=True)
    asked = [request(0, 5, 20, seed=1), request(1, 17, 20, seed=2), request(2, 1, 9, seed=3)]
    alone = []
    for one in asked:
        engine.submit([one])
        alone.append(content(finish(engine)[one.id]))
    for others in (3, 30):
        # Some before, some together with them, some later; of other lengths, so that rows move.
        company = [request(10 + n, 1 + 3 * (n % 9), 1 + n % 11, seed=n) for n in range(others)]
        engine.submit(company[::3])
        engine.step()
        engine.submit([*company[1::3], *reversed(asked)])
        engine.step()
        engine.submit(company[2::3])
        found = finish(engine)
        assert [content(found[one.id]) for one in asked] == alone


def test_both_lanes_give_the_same() -> None:
    """A restart may change which of its two places a set of weights gets."""
    made = model("llama")
    engine = engine_of(made, max_batch_tokens=12 * 40, deterministic=True)
    engine.submit([request(0, 9, 12)])
    first = content(finish(engine)[0])
    spare = engine._idle_spare(1.0)
    copy_weights(spare.model, named_weights(made))
    spare.load(VERSION)
    engine._current, engine._spare = spare, engine._current
    engine.submit([request(0, 9, 12)])
    assert content(finish(engine)[0]) == first


def test_a_request_beyond_its_share_of_the_tokens_is_refused() -> None:
    engine = engine_of(model("llama"), max_batch_tokens=12 * 20, deterministic=True)
    with pytest.raises(
        RequestError,
        match=r"may take 21 tokens and run\.deterministic gives each of policy\.max_sequences = 12 seq.* 20,",
    ):
        engine.submit([request(0, 11, 10)])
    engine.submit([request(0, 10, 10)])
    assert len(finish(engine)[0].token_ids) == 10


def test_a_machine_on_which_places_matter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Lane.decode

    def uneven(self: Lane) -> tuple[list[int], list[float]]:
        tokens, logprobs = decode(self)
        return tokens, [logprobs[0] - 1e-7, *logprobs[1:]]

    monkeypatch.setattr(Lane, "decode", uneven)
    with pytest.raises(SettingsError, match="on this machine the policy rounds a sequence differently"):
        engine_of(model("llama"), max_batch_tokens=12 * 40, deterministic=True)
