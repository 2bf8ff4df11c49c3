"""The reward service on loopback, with a tiny reward model or a rule, called through its proto."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from rlhf import errors
from rlhf.models.causal import weights_sha256
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.reward.head import RewardHead
from rlhf.reward.server import SERVICE, starting
from rlhf.reward.settings import RewardSettings
from rlhf.serving.client import call, connect, connect_sync
from rlhf.serving.server import running
from rlhf.settings.run import Settings
from rlhf.v1 import reward_pb2, reward_pb2_grpc
from rlhf.wire.tensors import from_ragged, from_tensor, to_ragged, to_tensor
from support.reflection import ReflectedService
from support.tiny import tiny_reward_folder, tiny_tokenizer

OWN = tokenizer_sha256(tiny_tokenizer())
END = tiny_tokenizer().eos_token_id
TEXTS = [("A fine film", " with a slow start."), ("The plot", " was dull."), ("I liked", " it!")]
RULES = """
import time


def length(items):
    return [len(item.completion) for item in items]


def answer(items):
    return [float(item.metadata["answer"] == item.completion) + 10 * len(item.tokens) for item in items]


def raises(items):
    raise ValueError("no rule for this")


def nan(items):
    return [float("nan")] * len(items)


def one_too_few(items):
    return [0.0] * (len(items) - 1)


def slow(items):
    time.sleep(0.5)
    return [0.0] * len(items)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_folder(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "some_rules.py"
    path.write_text(RULES)
    return path


@asynccontextmanager
async def service(**settings: Any) -> AsyncIterator[Any]:
    """A stub of a running service."""
    reward = RewardSettings(**settings)
    async with (
        running("reward", reward, [SERVICE], starting(Settings(reward=reward))) as server,
        connect(server.address, service=SERVICE) as channel,
    ):
        yield reward_pb2_grpc.RewardServiceStub(channel)


def encoded(texts: Sequence[tuple[str, str]] = TEXTS) -> list[tuple[list[int], list[int]]]:
    tokenizer = tiny_tokenizer()
    return [(tokenizer(prompt).input_ids, tokenizer(completion).input_ids) for prompt, completion in texts]


def token_batch(pairs: Sequence[tuple[list[int], list[int]]], sha256: str = OWN) -> reward_pb2.TokenBatch:
    return reward_pb2.TokenBatch(
        token_ids=to_ragged([np.array(prompt + completion, dtype=np.int32) for prompt, completion in pairs], np.int32),
        prompt_lengths=to_tensor(np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64)),
        tokenizer_sha256=sha256,
    )


def text_batch(texts: Sequence[tuple[str, str]] = TEXTS) -> reward_pb2.TextBatch:
    return reward_pb2.TextBatch(
        items=[reward_pb2.TextItem(prompt=prompt, completion=completion) for prompt, completion in texts]
    )


async def scores_of(stub: Any, **request: Any) -> list[float]:
    response = await call(stub.Score, reward_pb2.ScoreRequest(**request), timeout_s=20)
    return from_tensor(response.scores, "scores").tolist()


def refused(error: type[errors.RlhfError], says: str, settings: dict[str, Any], **request: Any) -> None:
    async def scenario() -> None:
        async with service(**settings) as stub:
            with pytest.raises(error, match=says):
                await scores_of(stub, **request)

    asyncio.run(scenario())


def test_scores_are_the_models_own(folder: Path) -> None:
    async def scenario() -> None:
        async with service(model=folder) as stub:
            request = reward_pb2.ScoreRequest(tokens=token_batch(encoded()), per_token=True)
            response = await call(stub.Score, request, timeout_s=20)
            model = RewardModel.load(folder)
            with torch.inference_mode():
                for index, (prompt, completion) in enumerate(encoded()):
                    ids = torch.tensor([[*prompt, *completion, END]])
                    mask = torch.ones_like(ids, dtype=torch.bool)
                    score = model(ids, mask).item()
                    values = (model.token_values(ids, mask)[0, len(prompt) : -1] - 0.25) / 0.5
                    assert from_tensor(response.scores, "")[index] == pytest.approx(score, abs=1e-5)
                    np.testing.assert_allclose(from_ragged(response.token_rewards, "")[index], values, atol=1e-5)
            assert len({round(float(score), 3) for score in from_tensor(response.scores, "")}) == 3
            assert from_tensor(response.member_scores, "").tolist() == [[s] for s in from_tensor(response.scores, "")]
            assert not from_tensor(response.spreads, "").any()
            assert response.model_sha256 == weights_sha256(folder)
            assert await scores_of(stub, texts=text_batch()) == from_tensor(response.scores, "").tolist()

    asyncio.run(scenario())


def test_a_completion_that_was_ended_scores_as_one_that_was_cut_off(folder: Path) -> None:
    cut = encoded()
    over = [(prompt, [*completion, END]) for prompt, completion in cut]

    async def scenario() -> None:
        async with service(model=folder) as stub:
            assert await scores_of(stub, tokens=token_batch(over)) == await scores_of(stub, tokens=token_batch(cut))
            request = reward_pb2.ScoreRequest(tokens=token_batch(over), per_token=True)
            response = await call(stub.Score, request, timeout_s=20)
            rows = from_ragged(response.token_rewards, "")
            assert [len(row) for row in rows] == [len(completion) for _, completion in over]
            assert [float(row[-1]) for row in rows] == from_tensor(response.scores, "").tolist()

    asyncio.run(scenario())


def test_a_completion_that_fills_the_context_is_scored_at_its_own_last_token(folder: Path) -> None:
    full = [([5, 6], [7] * 62)]

    async def scenario() -> None:
        async with service(model=folder) as stub:
            request = reward_pb2.ScoreRequest(tokens=token_batch([*full, *encoded()]), per_token=True)
            response = await call(stub.Score, request, timeout_s=20)
            model = RewardModel.load(folder)
            ids = torch.tensor([full[0][0] + full[0][1]])
            with torch.inference_mode():
                own = model(ids, torch.ones_like(ids, dtype=torch.bool)).item()
            score, *others = from_tensor(response.scores, "").tolist()
            row = from_ragged(response.token_rewards, "")[0]
            assert score == pytest.approx(own, abs=1e-5)
            assert (len(row), float(row[-1])) == (62, score)
            assert others == pytest.approx(await scores_of(stub, tokens=token_batch(encoded())), abs=1e-5)

    asyncio.run(scenario())


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(folder: Path) -> None:
    pairs = encoded([("A", " film." * n) for n in range(1, 9)])

    async def scenario() -> None:
        async with service(model=folder, max_batch_tokens=100, max_delay_ms=0) as stub:
            alone = [(await scores_of(stub, tokens=token_batch([pair])))[0] for pair in pairs]
            in_one_call = await scores_of(stub, tokens=token_batch(pairs))
            at_once = await asyncio.gather(*(scores_of(stub, tokens=token_batch([pair])) for pair in pairs))
        np.testing.assert_allclose(in_one_call, alone, atol=1e-5)
        np.testing.assert_allclose([score for (score,) in at_once], alone, atol=1e-5)

    asyncio.run(scenario())


def test_calls_share_forward_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = RewardHead.forward

    def recording(self: RewardHead, items: Sequence[Any]) -> Any:
        sizes.append(len(items))
        return forward(self, items)

    monkeypatch.setattr(RewardHead, "forward", recording)

    async def scenario() -> None:
        async with service(model=folder, max_delay_ms=200) as stub:
            await asyncio.gather(*(scores_of(stub, tokens=token_batch(encoded())) for _ in range(4)))

    asyncio.run(scenario())
    assert sizes == [12]


def test_tokens_of_another_tokenizer_are_scored_from_their_text(folder: Path) -> None:
    foreign = [([1, 2], [3]), ([4], [5, 6]), ([7], [8])]

    async def scenario() -> None:
        async with service(model=folder) as stub:
            expected = await scores_of(stub, texts=text_batch())
            got = await scores_of(stub, tokens=token_batch(foreign, "f" * 64), decoded=text_batch())
            assert got == pytest.approx(expected, abs=1e-5)
            empty_completion = text_batch([("A fine film", ""), *TEXTS[1:]])
            assert len(await scores_of(stub, tokens=token_batch(foreign, "f" * 64), decoded=empty_completion)) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_fields", "error", "says"),
    [
        ({}, errors.RequestError, "neither received"),
        ({"tokens": token_batch([])}, errors.RequestError, "at least one item"),
        ({"texts": text_batch([])}, errors.RequestError, "at least one item"),
        ({"tokens": token_batch([([1, 2], [])])}, errors.RequestError, "prompt_lengths: 2 for sequence 0 of 2 tokens"),
        ({"texts": text_batch([("A", "")])}, errors.RequestError, "completion of item 0 is empty"),
        ({"tokens": token_batch([([1], [2] * 64)])}, errors.RequestError, "65 tokens and the model's context is 64"),
        ({"texts": text_batch([("A", " film" * 99)])}, errors.RequestError, "the model's context is 64"),
        ({"tokens": token_batch([([1], [280])])}, errors.RequestError, "token 280, and the vocabulary ends at 279"),
        ({"tokens": token_batch([([1], [-1])])}, errors.RequestError, "token -1"),
        ({"tokens": token_batch(encoded() * 2)}, errors.RequestError, "6 items, and max_batch_size is 5"),
        ({"tokens": token_batch([([1], [2] * 50)])}, errors.RequestError, "52 tokens, and max_batch_tokens is 50"),
        ({"tokens": token_batch(encoded(), "f" * 64)}, errors.TokenizerMismatch, "made by tokenizer ffffffffffff"),
        (
            {"tokens": token_batch(encoded(), "f" * 64), "decoded": text_batch(), "per_token": True},
            errors.TokenizerMismatch,
            "per_token",
        ),
        ({"tokens": token_batch(encoded()), "decoded": text_batch(TEXTS[:1])}, errors.RequestError, "decoded: 1 items"),
        ({"tokens": token_batch(encoded()), "metadata": [{}]}, errors.RequestError, "metadata: 1 for 3 items"),
        (
            {"tokens": {"token_ids": to_ragged([np.zeros(2)], np.float32)}},
            errors.RequestError,
            "DTYPE_FLOAT32 is not accepted",
        ),
        ({"tokens": {"token_ids": {"values": to_tensor(np.zeros(2, np.int32))}}}, errors.RequestError, "cu_seqlens"),
    ],
)
def test_a_request_that_cannot_be_scored(
    folder: Path, request_fields: dict[str, Any], error: type[errors.RlhfError], says: str
) -> None:
    refused(
        error,
        says,
        {"model": folder, "max_batch_size": 5, "max_batch_tokens": 50 if "50" in says else 500},
        **request_fields,
    )


def test_more_than_may_wait_is_refused_with_a_time_to_try_again(rules: Path) -> None:
    async def scenario() -> list[Any]:
        reward = RewardSettings(rule=f"{rules}:slow", max_waiting_items=1)
        options = [("grpc.enable_retries", 0)]
        async with (
            running("reward", reward, [SERVICE], starting(Settings(reward=reward))) as server,
            grpc.aio.insecure_channel(server.address, options=options) as channel,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            request = reward_pb2.ScoreRequest(texts=text_batch())
            calls = [stub.Score(request, timeout=20) for _ in range(5)]
            return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(scenario())
    refusals = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert 3 <= len(refusals) < 5
    for refusal in refusals:
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(refusal.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


async def scores_of_within(stub: Any, timeout_s: float) -> list[float]:
    request = reward_pb2.ScoreRequest(texts=text_batch(TEXTS[:1]))
    response = await call(stub.Score, request, timeout_s=timeout_s)
    return from_tensor(response.scores, "scores").tolist()


def test_a_rule_scores_text_with_metadata_and_tokens(rules: Path) -> None:
    async def scenario() -> None:
        async with service(rule=f"{rules}:length") as stub:
            assert await scores_of(stub, texts=text_batch()) == [len(completion) for _, completion in TEXTS]
            info = await call(stub.Info, reward_pb2.RewardInfoRequest(), timeout_s=20)
            assert (info.kind, info.tokenizer_sha256, info.members) == ("rule", "", 1)
            assert len(info.model_sha256) == 64
        async with service(rule=f"{rules}:answer") as stub:
            got = await scores_of(
                stub,
                tokens=token_batch([([1], [2, 3]), ([1], [2])], "any"),
                decoded=text_batch([("6 x 7", "42"), ("6 x 7", "41")]),
                metadata=[{"fields": {"answer": "42"}}] * 2,
            )
            assert got == [21.0, 10.0]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("rule", "says"),
    [("raises", "raised ValueError: no rule for this"), ("nan", "answered nan"), ("one_too_few", r"shape \[2\] for 3")],
)
def test_a_rule_that_fails(rules: Path, rule: str, says: str) -> None:
    refused(errors.RuleError, says, {"rule": f"{rules}:{rule}"}, texts=text_batch())


def test_what_a_rule_cannot_score(rules: Path) -> None:
    settings = {"rule": f"{rules}:length"}
    refused(errors.RequestError, "a rule scores text", settings, tokens=token_batch(encoded()))
    refused(errors.RequestError, "per_token", settings, texts=text_batch(), per_token=True)


def test_a_slow_rule_does_not_hold_up_health_or_info(rules: Path) -> None:
    async def scenario() -> None:
        async with service(rule=f"{rules}:slow") as stub:
            scoring = asyncio.create_task(scores_of(stub, texts=text_batch()))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            await call(stub.Info, reward_pb2.RewardInfoRequest(), timeout_s=5)
            assert time.monotonic() - began < 0.3
            assert not scoring.done()
            await scoring

    asyncio.run(scenario())


def test_work_whose_deadline_has_passed_is_not_computed(rules: Path) -> None:
    path = rules.with_name("counting.py")
    path.write_text(RULES + "\nseen = []\n\ndef counted(items):\n    seen.append(items)\n    return slow(items)\n")

    async def scenario() -> None:
        async with service(rule=f"{path}:counted") as stub:
            first = asyncio.create_task(scores_of(stub, texts=text_batch()))
            await asyncio.sleep(0.1)
            with pytest.raises(errors.DeadlineExceeded):
                await scores_of_within(stub, 0.1)
            await first
            assert await scores_of(stub, texts=text_batch()) == [0.0, 0.0, 0.0]

    asyncio.run(scenario())
    module = next(module for name, module in sys.modules.items() if name.startswith("rlhf_rule_counting"))
    assert len(module.seen) == 2


def test_a_client_made_from_reflection_alone(folder: Path) -> None:
    def with_reflection(address: str) -> dict[str, Any]:
        with connect_sync(address) as channel:
            service = ReflectedService(channel, SERVICE)
            assert service.call("Info", {})["kind"] == "model"
            items = [{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS]
            return service.call("Score", {"texts": {"items": items}})

    async def scenario() -> None:
        settings = Settings(reward=RewardSettings(model=folder))
        async with running("reward", settings.reward, [SERVICE], starting(settings)) as server:
            response = await asyncio.to_thread(with_reflection, server.address)
        assert response["scores"]["shape"] == [3]
        scores = np.frombuffer(base64.b64decode(response["scores"]["data"]), "<f4")
        assert np.isfinite(scores).all()

    asyncio.run(scenario())


def test_info_of_a_model(folder: Path) -> None:
    async def scenario() -> None:
        async with service(model=folder, max_batch_tokens=123) as stub:
            info = await call(stub.Info, reward_pb2.RewardInfoRequest(), timeout_s=20)
        assert (info.kind, info.tokenizer_sha256, info.members, info.max_batch_tokens) == ("model", OWN, 1, 123)
        assert (info.normalisation_mean, info.normalisation_std) == (0.25, 0.5)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"model": Path("no/such/folder")}, errors.ModelError, "no/such/folder"),
        ({"rule": "no_such_module_here:rule"}, errors.SettingsError, "no module no_such_module_here"),
        ({"rule": "a:b", "model": Path("c")}, errors.SettingsError, "both set"),
    ],
)
def test_a_start_that_fails(settings: dict[str, Any], error: type[errors.RlhfError], says: str) -> None:
    async def scenario() -> None:
        async with service(**settings):
            pass

    with pytest.raises(error, match=says):
        asyncio.run(scenario())
