"""One score from several: the four rules, their limits, and one scale for all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.models.ensemble import Heads, RewardEnsemble, about, raw_values, save_heads
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel
from rlhf.reward.aggregate import Aggregation, aggregate
from rlhf.reward.server import SERVICE, starting
from rlhf.reward.settings import RewardSettings
from rlhf.serving.client import connect
from rlhf.serving.server import running
from rlhf.settings.run import Settings
from rlhf.v1 import reward_pb2, reward_pb2_grpc
from rlhf.wire.tensors import from_ragged, from_tensor
from support.tiny import tiny_adapted_folder, tiny_lm_folder, tiny_tokenizer

MEMBERS = np.array([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]], np.float32)


def test_the_rules() -> None:
    assert aggregate(MEMBERS, Aggregation("mean")).tolist() == [2.0, 0.5]
    assert aggregate(MEMBERS, Aggregation("worst")).tolist() == [1.0, 0.5]
    np.testing.assert_allclose(aggregate(MEMBERS, Aggregation("mean-variance", 0.5)), [2 - 0.5 * 2 / 3, 0.5])
    entropic = -0.7 * np.log(np.mean(np.exp(-MEMBERS / 0.7), axis=1))
    np.testing.assert_allclose(aggregate(MEMBERS, Aggregation("entropic", entropic_beta=0.7)), entropic, rtol=1e-6)


def test_entropic_lies_between_mean_and_worst_and_reaches_both() -> None:
    for beta, expected in ((1e6, 2.0), (1e-3, 1.0)):
        found = aggregate(MEMBERS, Aggregation("entropic", entropic_beta=beta))[0]
        assert found == pytest.approx(expected, abs=0.01)
    assert 1.0 < aggregate(MEMBERS, Aggregation("entropic"))[0] < 2.0
    far = aggregate(1e4 * MEMBERS, Aggregation("entropic", entropic_beta=0.1))
    assert np.isfinite(far).all()


@pytest.mark.parametrize("how", ["mean", "worst", "mean-variance", "entropic"])
def test_scale_is_the_reference_sets(how: str) -> None:
    reference = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    scores = Aggregation(how).scaled_on(reference)(reference)
    assert scores.dtype == np.float32
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores.std(ddof=1)) == pytest.approx(1, abs=1e-5)


def test_one_member_is_its_own_aggregate() -> None:
    assert Aggregation("entropic", mean=3.0)(MEMBERS[:, :1]).tolist() == [1.0, 0.5]


def test_service_answers_with_every_member(tmp_path: Path) -> None:
    model = RewardModel.new(tiny_lm_folder(tmp_path / "start"), seed=1)
    weight = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0))
    texts = [("A fine film", " with a slow start."), ("The plot", " was dull."), ("I liked", " it!")]
    tokenizer = tiny_tokenizer()
    ids = [[*tokenizer(a).input_ids, *tokenizer(b).input_ids, tokenizer.eos_token_id] for a, b in texts]
    with torch.no_grad():
        raw = raw_values([model.last_hidden(*pad(ids, 1))], weight)
    heads = Heads(weight, torch.zeros(1), torch.ones(1), torch.ones(1)).normalised(raw)
    model.facts["ensemble"] = about(heads, "shared")
    model.save(tmp_path / "e", tokenizer, (), lambda folder: save_heads(folder, heads))
    expected = Aggregation("worst").scaled_on(heads.reference_scores.numpy())  # type: ignore[union-attr]

    async def ask() -> None:
        reward = RewardSettings(model=tmp_path / "e", aggregation="worst", port=0)
        async with (
            running("reward", reward, [SERVICE], starting(Settings(reward=reward))) as server,
            connect(server.address, service=SERVICE) as channel,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            batch = reward_pb2.TextBatch(items=[reward_pb2.TextItem(prompt=a, completion=b) for a, b in texts])
            answer = await stub.Score(reward_pb2.ScoreRequest(texts=batch, per_token=True), timeout=20)
            members = from_tensor(answer.member_scores, "member_scores", dtypes="f", ndim=2)
            spreads = from_tensor(answer.spreads, "spreads", dtypes="f", ndim=1)
            np.testing.assert_allclose(spreads, np.std(members, axis=1), rtol=1e-6)
            assert spreads.min() > 0
            scores = from_tensor(answer.scores, "scores", dtypes="f", ndim=1)
            assert heads.reference_scores is not None
            np.testing.assert_allclose(members, heads.reference_scores.numpy(), atol=1e-4)
            np.testing.assert_allclose(scores, expected(members), atol=1e-4)
            tokens = from_ragged(answer.token_rewards, "token_rewards", dtypes="f")
            assert [len(own) for own in tokens] == [len(tokenizer(text).input_ids) for _, text in texts]
            assert (await stub.Info(reward_pb2.RewardInfoRequest(), timeout=20)).members == 3

    asyncio.run(ask())


def test_service_answers_with_the_spread_of_adapters(tmp_path: Path) -> None:
    folder, tokenizer = tiny_adapted_folder(tmp_path / "adapted"), tiny_tokenizer()
    texts = [("A fine film", " with a slow start."), ("The plot", " was dull."), ("I liked", " it!")]
    ids = [[*tokenizer(a).input_ids, *tokenizer(b).input_ids, tokenizer.eos_token_id] for a, b in texts]
    with torch.no_grad():
        values = [RewardEnsemble.load(folder).token_values(*pad([one], 1))[0, -1].numpy() for one in ids]

    async def ask() -> None:
        reward = RewardSettings(model=folder, port=0)
        async with (
            running("reward", reward, [SERVICE], starting(Settings(reward=reward))) as server,
            connect(server.address, service=SERVICE) as channel,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            batch = reward_pb2.TextBatch(items=[reward_pb2.TextItem(prompt=a, completion=b) for a, b in texts])
            answer = await stub.Score(reward_pb2.ScoreRequest(texts=batch), timeout=20)
            members = from_tensor(answer.member_scores, "member_scores", dtypes="f", ndim=2)
            np.testing.assert_allclose(members, values, atol=1e-4)
            spreads = from_tensor(answer.spreads, "spreads", dtypes="f", ndim=1)
            np.testing.assert_allclose(spreads, np.std(values, axis=1), atol=1e-4)
            assert spreads.min() > 1e-2

    asyncio.run(ask())
