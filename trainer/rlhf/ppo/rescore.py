"""The scores of kept rollouts by another reward model, or by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf.models.folders import start_model
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf.ppo.settings import ReplaySettings
from rlhf.reward.aggregate import aggregation_of
from rlhf.reward.head import RewardHead
from rlhf.reward.requests import Texts, TokenItem
from rlhf.reward.rules import ScoreItem, load_rule
from rlhf.reward.scores import Score
from rlhf.settings.run import Settings
from rlhf.wire.records import Rollout, ScoredCompletion


def rescored(rollouts: Sequence[Rollout], replay: ReplaySettings, settings: Settings) -> tuple[Rollout, ...]:
    """The rollouts as they would have come with other scores; as they are where no others are asked for.

    Raises:
        ModelError: the folder holds no reward model.
        RuleError: the rule raised, or answered nonsense.
    """
    if replay.reward_rule:
        rule = load_rule(replay.reward_rule)
        return tuple(_with_scores(one, _alone(rule.score(_items(one)).tolist()), rule.sha256) for one in rollouts)
    if replay.reward_model is None:
        return tuple(rollouts)
    reward = settings.reward
    head = RewardHead.load(replay.reward_model, reward.device, reward.dtype, 0, aggregation_of(reward))
    tokenizer = load_tokenizer(settings.ppo.model or start_model(settings))
    same = tokenizer_sha256(tokenizer) == head.about.tokenizer_sha256
    return tuple(_with_scores(one, _scores(head, one, same), head.about.model_sha256) for one in rollouts)


def _scores(head: RewardHead, rollout: Rollout, same_tokenizer: bool) -> list[Score]:
    if same_tokenizer:
        items = [TokenItem(c.token_ids.astype(np.int64), _prompt_length(c)) for c in rollout.completions]
    else:
        items = list(head.encode([Texts(rollout.prompt, c.text) for c in rollout.completions]))
    return head.forward([head.reading(item) for item in items])


def _items(rollout: Rollout) -> list[ScoreItem]:
    return [
        ScoreItem(rollout.prompt, c.text, tuple(c.token_ids[c.response_mask].tolist()), rollout.metadata)
        for c in rollout.completions
    ]


def _alone(scores: Sequence[float]) -> list[Score]:
    none = np.zeros(0, np.float32)
    return [Score(score, none, np.array([score], np.float32)) for score in scores]


def _with_scores(rollout: Rollout, scores: Sequence[Score], sha256: str) -> Rollout:
    completions = tuple(
        replace(completion, score=score.score, member_scores=score.members)
        for completion, score in zip(rollout.completions, scores, strict=True)
    )
    return replace(rollout, completions=completions, reward_sha256=sha256)


def _prompt_length(completion: ScoredCompletion) -> int:
    return int(completion.response_mask.argmax())
