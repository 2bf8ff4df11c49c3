"""Rewards and log-probs of completions, by the same code that the reward and reference services run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf.evaluate.policies import Answer
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.reward.head import RewardHead
from rlhf.reward.requests import Texts, TokenItem
from rlhf.reward.rules import Rule, ScoreItem

Scores = NDArray[np.float64]
T = TypeVar("T")

_REWARD_BATCH = 64
_MAX_LOGITS = 2**26
"""Numbers in one batch's logits: 256 MiB."""


class Rewards(Protocol):
    def score(self, answers: Sequence[Answer]) -> Scores:
        """[N]"""


class ModelRewards:
    """A reward model's folder. Tokens go in as they are if it has the policy's tokenizer, otherwise the text does."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        """
        Raises:
            ModelError: the folder holds no reward model.
        """
        self._head = RewardHead.load(folder, device, dtype, threads=0)

    def score(self, answers: Sequence[Answer]) -> Scores:
        readings = [self._head.reading(self._tokens(answer)) for answer in answers]
        batches = _chunks(readings, _REWARD_BATCH)
        return np.array([score.score for batch in batches for score in self._head.forward(batch)])

    def _tokens(self, answer: Answer) -> TokenItem:
        if answer.tokenizer_sha256 == self._head.about.tokenizer_sha256:
            return TokenItem(answer.token_ids, len(answer.prompt_ids))
        return self._head.encode([Texts(answer.prompt.text, answer.text)])[0]


class RuleRewards:
    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def score(self, answers: Sequence[Answer]) -> Scores:
        return self._rule.score(score_items(answers)).astype(np.float64)


def score_items(answers: Sequence[Answer]) -> list[ScoreItem]:
    return [
        ScoreItem(answer.prompt.text, answer.text, tuple(answer.response_ids.tolist()), answer.prompt.metadata)
        for answer in answers
    ]


def logprob_sums(model: ReferenceModel, answers: Sequence[Answer], temperature: float) -> Scores:
    """[N]: log p(response | prompt) at the temperature, in nats, before top-k and the like."""
    items = [Item(answer.token_ids, len(answer.prompt_ids), temperature) for answer in answers]
    longest = max(len(item.token_ids) for item in items)
    batches = _chunks(items, max(1, _MAX_LOGITS // (longest * model.vocab_size)))
    return np.array([logprobs.sum(dtype=np.float64) for batch in batches for logprobs in model.forward(batch)])


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
