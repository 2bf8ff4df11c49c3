"""The doctor tries models: services in this process, with a fault in them or none."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.doctor import models
from rlhf.doctor.findings import Finding
from rlhf.doctor.models import check_logprobs, check_reward, check_tokens
from rlhf.models.adapters import add_adapter
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.ensemble import RewardEnsemble
from rlhf.models.weights import named_weights, write_weights
from rlhf.policy.sampler import Sampler
from rlhf.policy.server import POLICY, SERVICES, load_engine, serving
from rlhf.ppo.settings import LoraSettings
from rlhf.queues.registry import Current
from rlhf.reward.server import SERVICE as REWARD
from rlhf.reward.server import starting
from rlhf.serving.server import Server, running
from rlhf.settings.run import Settings
from support.tiny import tiny_lm_folder, tiny_reward_folder, tiny_tokenizer


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings.model_validate({"run": {"folder": tmp_path, "name": "tiny"}})
    tiny_lm_folder(made.paths.pretrained)
    return made


@asynccontextmanager
async def policy(settings: Settings) -> AsyncIterator[tuple[str, Any]]:
    """Address and engine of a running service."""
    engine, codec = load_engine(settings)

    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        async with serving(server, engine, codec, settings.policy):
            await server.set_ready(POLICY, True)
            yield

    async with running("policy", settings.policy, SERVICES, start) as server:
        yield server.address, engine


def logprobs_finding(
    settings: Settings, change: Callable[[Any], None] = lambda engine: None, current: Current | None = None
) -> Finding:
    """Of a policy that serves the settings' model, its engine changed."""

    async def ask() -> list[Finding]:
        async with policy(settings) as (address, engine):
            change(engine)
            return await asyncio.to_thread(lambda: list(check_logprobs(settings, {"policy-0": address}, current)))

    (finding,) = asyncio.run(ask())
    return finding


def test_a_policy_that_serves_its_folder(settings: Settings) -> None:
    finding = logprobs_finding(settings)
    assert finding.ok
    assert finding.what.startswith("policy-0's are those of its weights, up to ")


def test_a_policy_that_generates_with_other_weights(settings: Settings, tmp_path: Path) -> None:
    def swap(engine: Any) -> None:
        other = load_causal_lm(tiny_lm_folder(tmp_path / "other", seed=5))
        engine._current.model.load_state_dict(other.state_dict())

    finding = logprobs_finding(settings, swap)
    assert not finding.ok
    assert "other weights" in finding.what
    assert finding.remedy.startswith("start policy-0 again")


def test_a_policy_that_forgets_the_temperature(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sampler.sample

    def raw(self: Any, logits: torch.Tensor, steps: Any) -> Any:
        tokens, _ = sample(self, logits, steps)
        return tokens, torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, None])[:, 0]

    monkeypatch.setattr(Sampler, "sample", raw)
    finding = logprobs_finding(settings)
    assert not finding.ok
    assert "the temperature was forgotten" in finding.what


def test_a_policy_whose_logprobs_are_those_behind_top_p(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    init = Sampler.__init__

    def processed(self: Any, *args: Any) -> None:
        init(self, *args)
        if self._changed:
            self._processed = torch.ones_like(self._processed)

    monkeypatch.setattr(Sampler, "__init__", processed)
    finding = logprobs_finding(settings)
    assert not finding.ok
    assert "normalised over fewer tokens" in finding.what


def test_weights_of_a_run_are_compared_with_what_the_trainer_wrote(settings: Settings, tmp_path: Path) -> None:
    trained = load_causal_lm(tiny_lm_folder(tmp_path / "trained", seed=5))
    folder = tmp_path / "0-1"
    version = write_weights(folder, trained, run_id="r", epoch=0, step=1, tokenizer_sha256=_tokenizer_sha256())
    current = Current(version, folder.as_uri())

    def follow(engine: Any) -> None:
        engine.prepare(folder, version, 5.0)
        engine.commit(version, None, keep=False)

    def claim(engine: Any) -> None:
        engine._current.version = version

    assert logprobs_finding(settings, follow, current).ok
    finding = logprobs_finding(settings, claim, current)
    assert not finding.ok
    assert str(version) in finding.what


def test_an_adapter_is_compared_as_the_policy_it_makes(settings: Settings, tmp_path: Path) -> None:
    trained = load_causal_lm(settings.paths.pretrained)
    add_adapter(trained, LoraSettings(rank=2), weights_sha256(settings.paths.pretrained), 0)
    with torch.no_grad():
        for tensor in named_weights(trained).values():
            tensor.add_(0.3)
    folder = tmp_path / "0-1"
    version = write_weights(folder, trained, run_id="r", epoch=0, step=1, tokenizer_sha256=_tokenizer_sha256())
    current = Current(version, folder.as_uri())

    def follow(engine: Any) -> None:
        engine.prepare(folder, version, 5.0)
        engine.commit(version, None, keep=False)

    def claim(engine: Any) -> None:
        engine._current.version = version

    assert logprobs_finding(settings, follow, current).ok
    assert not logprobs_finding(settings, claim, current).ok


def test_what_cannot_be_compared_is_said(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(engine: Any) -> None:
        engine._current.version = engine._current.version.__class__("r", 0, 4, "c" * 64)

    finding = logprobs_finding(settings, claim)
    assert (finding.ok, finding.what) == (True, "policy-0 was given other weights meanwhile; not compared")
    monkeypatch.setattr(models, "LARGEST_GIB", 0.0)
    finding = logprobs_finding(settings)
    assert finding.ok
    assert "are not compared" in finding.what


def _tokenizer_sha256() -> str:
    from rlhf.models.tokenizer import tokenizer_sha256

    return tokenizer_sha256(tiny_tokenizer())


def reward_finding(settings: Settings) -> Finding:
    (finding,) = check_reward(settings, None)
    return finding


def test_a_reward_model_that_reads_its_mask(settings: Settings) -> None:
    assert list(check_reward(settings, None)) == [], "there is none yet"
    tiny_reward_folder(settings.paths.reward_model)
    finding = reward_finding(settings)
    assert finding.ok
    assert finding.what.startswith("4 completions score alike alone, together and backwards")


def test_a_reward_model_whose_scores_depend_on_padding(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_reward_folder(settings.paths.reward_model)
    values = RewardEnsemble.token_values

    def with_padding(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As of a model that adds up over all positions."""
        return values(self, input_ids, attention_mask) + 0.01 * (~attention_mask).sum(1)[:, None, None]

    monkeypatch.setattr(RewardEnsemble, "token_values", with_padding)
    finding = reward_finding(settings)
    assert not finding.ok
    assert "changes by 0." in finding.what
    assert "attention mask" in finding.remedy


def test_a_rule_that_compares_the_items_of_a_call(settings: Settings, tmp_path: Path) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text(
        "def alone(items):\n    return [float(item.metadata['answer'] in item.completion) for item in items]\n"
        "def ranks(items):\n    return [float(i) for i, _ in enumerate(items)]\n"
    )
    settings.paths.prompts.parent.mkdir(parents=True)
    settings.paths.prompts.write_text(json.dumps({"prompt": "2 and 2?", "answer": "same"}) + "\n")

    def with_rule(name: str) -> Settings:
        return settings.model_copy(update={"reward": settings.reward.model_copy(update={"rule": f"{rules}:{name}"})})

    assert reward_finding(with_rule("alone")).ok
    finding = reward_finding(with_rule("ranks"))
    assert not finding.ok
    assert "changes by 3 " in finding.what


def test_a_reward_service_is_asked_where_one_answers(settings: Settings) -> None:
    tiny_reward_folder(settings.paths.reward_model)

    async def ask() -> list[Finding]:
        async with running("reward", settings.reward, [REWARD], starting(settings)) as server:
            return await asyncio.to_thread(lambda: list(check_reward(settings, server.address)))

    (finding,) = asyncio.run(ask())
    assert finding.ok


def test_an_end_that_cannot_be_told_from_padding(settings: Settings) -> None:
    def told(changes: dict[str, Any]) -> Sequence[Finding]:
        path = settings.paths.pretrained / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return list(check_tokens(settings))

    (fine,) = told({})
    assert str(fine) == "ok       tokens     the policy ends with '<|end|>' (0) and pads with '<|pad|>' (1)"
    (same,) = told({"pad_token": "<|end|>"})
    assert not same.ok
    assert same.what.endswith("an end cannot be told from padding")
    (none,) = told({"eos_token": None})
    assert not none.ok
    assert "has no end token" in none.what


def test_a_folder_that_does_not_exist_yet_is_no_problem(tmp_path: Path) -> None:
    nothing = Settings.model_validate({"run": {"folder": tmp_path, "name": "none"}})
    assert list(check_tokens(nothing)) == []
    assert list(check_reward(nothing, None)) == []
