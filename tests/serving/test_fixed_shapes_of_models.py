"""Reward model and reference in fixed shapes: an item's numbers are the same to the last bit in any company."""

from pathlib import Path

import numpy as np
import pytest

from rlhf.models.causal import new_causal_lm, save_model
from rlhf.models.reward import RewardModel
from rlhf.reference import server as reference
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.reward import server as reward
from rlhf.reward.head import RewardHead
from rlhf.reward.requests import TokenItem
from rlhf.sft.settings import PretrainSettings
from support.tiny import tiny_tokenizer

LENGTHS = (3, 7, 16, 17, 40, 9, 16, 95)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough that sums in another order differ in their last bits."""
    settings = PretrainSettings(
        architecture=request.param, hidden_size=64, layers=2, heads=4, context=96, sequence_length=32
    )
    folder = tmp_path_factory.mktemp("model")
    save_model(new_causal_lm(settings, tiny_tokenizer()), tiny_tokenizer(), folder / "policy")
    RewardModel.new(folder / "policy").save(folder / "reward", tiny_tokenizer())
    return folder


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(2, 280, length).astype(np.int32)


def test_the_reference(folder: Path) -> None:
    model = ReferenceModel.load(folder / "policy", "cpu", "float32", 1)
    forward = reference._repeatable(model)
    items = [Item(tokens(length), length // 2, 0.8) for length in LENGTHS]
    alone = [forward([item])[0].tobytes() for item in items]
    together = [row.tobytes() for row in forward([*items, *items[::-1]])]
    assert together == alone + alone[::-1]
    plain = model.forward(items)
    for row, other in zip(forward(items), plain, strict=True):
        np.testing.assert_allclose(row, other, atol=2e-5)


def test_the_reward_model(folder: Path) -> None:
    head = RewardHead.load(folder / "reward", "cpu", "float32", 1)
    forward = reward._repeatable(head)
    readings = [head.reading(TokenItem(tokens(length).astype(np.int64), 1)) for length in LENGTHS]

    def numbers(scores: list) -> list:
        return [(score.score, score.token_rewards.tobytes()) for score in scores]

    alone = [numbers(forward([reading]))[0] for reading in readings]
    assert numbers(forward([*readings, *readings[::-1]])) == alone + alone[::-1]
    for score, other in zip(forward(readings), head.forward(readings), strict=True):
        np.testing.assert_allclose(score.score, other.score, atol=2e-5)
