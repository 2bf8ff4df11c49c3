"""What gives the scores: a trained reward model, batched over calls, or a rule, given one call at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlhf.errors import ModelError, RequestError, TokenizerMismatch
from rlhf.reward.requests import Call, TokenItem
from rlhf.reward.rules import Rule, ScoreItem
from rlhf.reward.scores import About, Reading, Score
from rlhf.serving.batcher import Batcher, Limits
from rlhf.serving.token_checks import check_tokenizer, check_tokens
from rlhf.serving.worker_thread import WorkerThread

if TYPE_CHECKING:
    from rlhf.reward.head import RewardHead  # needs torch, which a rule does not


class Scorer(Protocol):
    @property
    def about(self) -> About: ...
    @property
    def batcher(self) -> Batcher[Reading, Score] | Batcher[Call, list[Score]]: ...
    async def score(self, call: Call) -> list[Score]: ...


class ModelScorer:
    def __init__(
        self,
        head: RewardHead,
        worker: WorkerThread,
        limits: Limits,
        forward: Callable[[Sequence[Reading]], Sequence[Score]] | None = None,
    ) -> None:
        """
        Args:
            forward: the head's, in passes of other shapes. None: as it is.
        """
        self.about = head.about
        self.batcher = Batcher(worker, forward or head.forward, limits, length=lambda reading: len(reading.token_ids))
        self._head = head
        self._worker = worker
        self._max_tokens = head.max_context_tokens or limits.max_batch_tokens

    async def score(self, call: Call) -> list[Score]:
        """
        Raises:
            TokenizerMismatch: tokens of another tokenizer, and no text beside them; or scores per token of such.
            RequestError: a sequence does not fit the model.
            Overloaded: too much is waiting.
            ModelError: the model's answer is not finite.
        """
        readings = [self._head.reading(item) for item in await self._items(call)]
        check_tokens(
            [reading.token_ids for reading in readings],
            "tokens, with the end token that is read behind each",
            vocab_size=self._head.vocab_size,
            max_tokens=self._max_tokens,
        )
        scores = await self.batcher.submit(readings)
        for index, score in enumerate(scores):
            if not np.isfinite(score.score) or not np.isfinite(score.token_rewards).all():
                raise ModelError(
                    f"the reward model's values on item {index} are not finite; its weights are damaged, or too large "
                    "for the service's dtype"
                )
        return scores

    async def _items(self, call: Call) -> tuple[TokenItem, ...]:
        own = self.about.tokenizer_sha256
        if call.tokens is not None and call.tokenizer_sha256 in ("", own):
            return call.tokens
        if call.texts is None:
            check_tokenizer(call.tokenizer_sha256, own, "tokens, and no `decoded` beside them")
            raise RequestError("tokens: none were sent")
        if call.tokens is not None and call.per_token:
            raise TokenizerMismatch("per_token: the reward model has another tokenizer, so its tokens are other ones")
        return await self._worker.run(self._head.encode, call.texts)


class RuleScorer:
    """Each call goes to the rule by itself and whole: a rule that fails on one call's items fails no other call."""

    def __init__(self, rule: Rule, worker: WorkerThread, limits: Limits) -> None:
        self.about = About("rule", rule.sha256, "", 0.0, 1.0)
        self._rule = rule
        one_call = Limits(
            max_batch_size=1, max_batch_tokens=1, max_waiting_items=limits.max_waiting_items, max_delay_s=0
        )
        self.batcher = Batcher(worker, self._score_calls, one_call, length=lambda _: 1)

    async def score(self, call: Call) -> list[Score]:
        """
        Raises:
            RequestError: no text was sent, or scores per token are asked for.
            RuleError: the rule raised, or answered nonsense.
            Overloaded: too many calls are waiting.
        """
        if call.texts is None:
            raise RequestError("a rule scores text: send `texts`, or `decoded` beside `tokens`")
        if call.per_token:
            raise RequestError("per_token: a rule gives one score for a completion and none for its tokens")
        return (await self.batcher.submit([call]))[0]

    def _score_calls(self, calls: Sequence[Call]) -> list[list[Score]]:
        none = np.zeros(0, np.float32)
        return [
            [Score(float(score), none, np.array([score])) for score in self._rule.score(_rule_items(call))]
            for call in calls
        ]


def _rule_items(call: Call) -> list[ScoreItem]:
    tokens = [()] * len(call) if call.tokens is None else [_completion_tokens(item) for item in call.tokens]
    return [
        ScoreItem(item.prompt, item.completion, tokens, metadata)
        for item, tokens, metadata in zip(call.texts or (), tokens, call.metadata, strict=True)
    ]


def _completion_tokens(item: TokenItem) -> tuple[int, ...]:
    return tuple(item.token_ids[item.prompt_length :].tolist())
