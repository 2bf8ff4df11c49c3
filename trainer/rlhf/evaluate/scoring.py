"""Rewards and log-probs of completions, by the same code that the reward and reference services run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf.evaluate.policies import Answer, Policy
from rlhf.models.padding import pad
from rlhf.ops.logprobs import logprobs_kl_from_logits
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.reward.aggregate import Aggregation, aggregation_of
from rlhf.reward.exchange import read_pointer
from rlhf.reward.head import RewardHead
from rlhf.reward.requests import Texts, TokenItem
from rlhf.reward.rules import Rule, ScoreItem, load_rule
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings

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

    def __init__(self, folder: Path, device: str, dtype: str, aggregation: Aggregation) -> None:
        """
        Raises:
            ModelError: the folder holds no reward model.
        """
        self._head = RewardHead.load(folder, device, dtype, 0, aggregation)

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


def load_rewards(settings: Settings) -> tuple[Rewards, str]:
    """The rule if one is set, else the reward model, its members taken together as PPO had them; and what it is called.
    Of a run with rounds of feedback it is the model in service at the end, which scores both policies, so that they are
    on one scale.

    Raises:
        ModelError, RuleError: it cannot be loaded.
    """
    its, paths = settings.evaluate, settings.paths
    if its.reward_rule:
        return RuleRewards(load_rule(its.reward_rule)), its.reward_rule
    folder = its.reward_model or _refreshed(paths) or _first(settings)
    return ModelRewards(folder, its.device, its.dtype, aggregation_of(settings.reward)), str(folder)


def load_first_rewards(settings: Settings) -> Rewards | None:
    """The reward model that PPO began with; None where `load_rewards` gives no refreshed one.

    Raises:
        ModelError: it cannot be loaded.
    """
    its, paths = settings.evaluate, settings.paths
    if its.reward_rule or its.reward_model or _refreshed(paths) is None:
        return None
    return ModelRewards(_first(settings), its.device, its.dtype, aggregation_of(settings.reward))


def _first(settings: Settings) -> Path:
    return settings.reward.model or settings.paths.reward_model


def _refreshed(paths: RunPaths) -> Path | None:
    pointer = read_pointer(paths.reward_in_service)
    return None if pointer is None else paths.rounds / str(pointer.round) / "reward-model"


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
    return np.array([logprobs.sum(dtype=np.float64) for batch in batches for logprobs in model.logprobs(batch)])


def kl_sums(policy: Policy, initial: Policy, answers: Sequence[Answer], temperature: float) -> Scores:
    """[N]: KL(policy ‖ initial) in nats at each token of the policy's own answers, over the whole vocabulary, summed.

    Its mean is that of the difference of `logprob_sums`, without what is due to which token was drawn: it is never
    negative, and varies less. Before top-k and the like.
    """
    batches = _chunks(answers, max(1, _MAX_LOGITS // 4 // (_longest(answers) * policy.as_reference().vocab_size)))
    return np.concatenate([_kl_sums(policy, initial, batch, temperature) for batch in batches])


def _kl_sums(policy: Policy, initial: Policy, answers: Sequence[Answer], temperature: float) -> Scores:
    ids, mask = (part.to(policy.model.device) for part in pad([answer.token_ids for answer in answers], pad_id=0))
    # The logits at t give the distribution of token t + 1.
    response_mask = mask[:, 1:].clone()
    for row, answer in enumerate(answers):
        response_mask[row, : len(answer.prompt_ids) - 1] = False
    with torch.inference_mode():
        logits, initial_logits = (
            one.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1][response_mask]
            for one in (policy, initial)
        )
        found = logprobs_kl_from_logits(logits, initial_logits, ids[:, 1:][response_mask], temperature)
    assert found.kl is not None
    kl = found.kl.double().cpu().numpy()
    ends = np.cumsum([len(answer.response_ids) for answer in answers])
    return np.array([part.sum() for part in np.split(kl, ends[:-1])])


def _longest(answers: Sequence[Answer]) -> int:
    return max(len(answer.token_ids) for answer in answers)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
