"""Adapters as published weights: the policy merges them with the model it started on, and with no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.errors import ModelError
from rlhf.models.adapters import add_adapter, merged
from rlhf.models.base import Base
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.models.weights import named_weights, write_weights
from rlhf.ops import logprobs_from_logits
from rlhf.policy.continuous import ContinuousEngine
from rlhf.policy.engine import Finished, GenerationRequest
from rlhf.policy.server import load_engine
from rlhf.ppo.settings import LoraSettings
from rlhf.settings.run import Settings
from rlhf.wire.records import Sampling, Stopping, WeightVersion
from support.tiny import tiny_lm_folder, tiny_tokenizer

OWN = tokenizer_sha256(tiny_tokenizer())


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_lm_folder(tmp_path / "base", request.param)


def adapted(base: Path, seed: int = 0) -> torch.nn.Module:
    """Trained, as far as anyone can tell."""
    model = load_causal_lm(base)
    settings = LoraSettings(rank=2, target_modules="all-linear" if seed % 2 else None)
    add_adapter(model, settings, weights_sha256(base), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in named_weights(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def publish(folder: Path, model: torch.nn.Module, step: int) -> WeightVersion:
    return write_weights(folder / f"0-{step}", model, run_id="r", epoch=0, step=step, tokenizer_sha256=OWN)


def engine_on(base: Path, dtype: str = "float32") -> ContinuousEngine:
    engine, _ = load_engine(Settings.model_validate({"policy": {"model": base, "dtype": dtype, "threads": 1}}))
    assert isinstance(engine, ContinuousEngine)
    return engine


def change(engine: ContinuousEngine, folder: Path, version: WeightVersion) -> None:
    engine.prepare(folder / f"0-{version.step}", version, 1)
    engine.commit(version, None, keep=False)


def generated(engine: ContinuousEngine) -> tuple[np.ndarray, np.ndarray]:
    """A prompt with its response, and the response's log-probs."""
    prompt = np.arange(5, 12, dtype=np.int32)
    engine.submit([GenerationRequest(0, prompt, 0, Sampling(), Stopping(10, ignore_eos=True))])
    while True:
        for event in engine.step():
            assert isinstance(event, Finished), event
            assert event.logprobs is not None
            return np.concatenate([prompt, event.token_ids]), event.logprobs


@torch.no_grad()
def expected(model: torch.nn.Module, token_ids: np.ndarray) -> np.ndarray:
    tokens = torch.from_numpy(token_ids.astype(np.int64))
    logits = model(tokens[None]).logits[0, 6:-1]
    return logprobs_from_logits(logits, tokens[7:]).logprobs.numpy()


def test_one_adapter_after_the_other_each_on_the_base_itself(base: Path, tmp_path: Path) -> None:
    """They change other layers in turn: what the last one changed must be the base's again."""
    engine = engine_on(base)
    for step in range(1, 5):
        model = adapted(base, seed=step)
        change(engine, tmp_path, publish(tmp_path, model, step))
        tokens, logprobs = generated(engine)
        np.testing.assert_allclose(logprobs, expected(model, tokens), atol=1e-4, rtol=0)
        held, ordinary = named_weights(engine._current.model), named_weights(merged(model))  # type: ignore[arg-type]
        assert all(held[name].equal(ordinary[name]) for name in held), "bit for bit what the finished policy will be"
    engine.rollback(None, keep=False)
    tokens, logprobs = generated(engine)
    np.testing.assert_allclose(logprobs, expected(adapted(base, seed=3), tokens), atol=1e-4, rtol=0)


def test_whole_weights_and_adapters_take_turns(base: Path, tmp_path: Path) -> None:
    engine = engine_on(base)
    other = load_causal_lm(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    for step, model in enumerate((other, adapted(base), other, adapted(base, 1)), start=1):
        change(engine, tmp_path, publish(tmp_path, model, step))
        tokens, logprobs = generated(engine)
        np.testing.assert_allclose(logprobs, expected(model, tokens), atol=1e-4, rtol=0)


def test_in_bfloat16_base_and_adapter_are_rounded_once(base: Path, tmp_path: Path) -> None:
    engine, model = engine_on(base, "bfloat16"), adapted(base, 1)
    change(engine, tmp_path, publish(tmp_path, model, 1))
    held, ordinary = named_weights(engine._current.model), named_weights(merged(model))  # type: ignore[arg-type]
    assert all(held[name].equal(ordinary[name].bfloat16()) for name in held)


def test_a_policy_on_another_model_refuses_and_keeps_what_it_has(base: Path, tmp_path: Path) -> None:
    other = tiny_lm_folder(tmp_path / "other", seed=9)
    engine = engine_on(other)
    before = generated(engine)
    version = publish(tmp_path, adapted(base), 1)
    with pytest.raises(ModelError, match=rf"0-1: the adapter is for the model with sha256 {weights_sha256(base)[:12]}"):
        engine.prepare(tmp_path / "0-1", version, 1)
    assert engine.versions.prepared is None
    after = generated(engine)
    assert before[0].tolist() == after[0].tolist()


def test_an_adapter_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    llama, gpt2 = (tiny_lm_folder(tmp_path / name, name) for name in ("llama", "gpt2"))
    model = load_causal_lm(gpt2)
    add_adapter(model, LoraSettings(rank=2), weights_sha256(llama), 0)
    with pytest.raises(ModelError, match="the adapter does not fit the model"):
        engine_on(llama).prepare(tmp_path / "0-1", publish(tmp_path, model, 1), 1)


def test_an_engine_without_a_folder_takes_whole_weights_alone(base: Path, tmp_path: Path) -> None:
    engine = engine_on(base)
    engine._base = None
    with pytest.raises(ModelError, match="an adapter needs the model that it is for"):
        engine.prepare(tmp_path / "0-1", publish(tmp_path, adapted(base), 1), 1)


def test_the_base_is_loaded_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = list[Path]()
    monkeypatch.setattr(
        "rlhf.models.base.load_causal_lm", lambda folder: loads.append(folder) or load_causal_lm(folder)
    )
    engine = engine_on(base)
    assert isinstance(engine._base, Base)
    for step in (1, 2, 3):
        change(engine, tmp_path, publish(tmp_path, adapted(base, step), step))
    assert loads == [base]
