"""What a round measures: is the refreshed reward model better, did choosing actively pay, do the judges like the new
policy better. Every figure is a mean over prompts with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.evaluate.statistics import bootstrap_interval
from rlhf.feedback.judgments import Judgment

Doubles = NDArray[np.float64]
PSEUDO_PAIRS = 10.0
"""How many pairs the head in service counts as, in each direction, when labels are weighed."""
NEWTON_STEPS = 12


@dataclass(frozen=True)
class Mean:
    value: float
    interval: tuple[float, float]
    count: int
    """Of prompts."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """
        Args:
            values: at least one.
        """
        return cls(float(np.mean(values)), bootstrap_interval(values, seed=0), len(values))

    def as_json(self, name: str) -> dict[str, Any]:
        return {name: self.value, f"{name}_interval": list(self.interval)}


def by_prompt(judgments: Sequence[Judgment], values: Sequence[float | None]) -> list[float]:
    """Mean of each prompt's values, because judgments of one prompt are not independent; None is left out."""
    found: dict[str, list[float]] = {}
    for judgment, value in zip(judgments, values, strict=True):
        if value is not None:
            found.setdefault(judgment.prompt_id, []).append(value)
    return [float(np.mean(some)) for some in found.values()]


def orders_alike(ranks: Sequence[int], scores: Sequence[float]) -> float | None:
    """Share of the pairs that the judge orders which the scores order too; equal scores count half. None: all ties."""
    pairs = [(i, j) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]]
    if not pairs:
        return None
    right = [(1 + np.sign((scores[i] - scores[j]) * (ranks[j] - ranks[i]))) / 2 for i, j in pairs]
    return float(np.mean(right))


def compare_models(
    judgments: Sequence[Judgment], in_service: Sequence[Doubles], new: Sequence[Doubles], margin: float
) -> dict[str, Any]:
    """Both reward models against held-out judgments of the newest policy, paired by prompt.

    Args:
        in_service, new: [K] scores of each judgment's completions.
        margin: by which the new one may be worse and still be promoted.
    """
    before = [orders_alike(one.ranks, scores.tolist()) for one, scores in zip(judgments, in_service, strict=True)]
    after = [orders_alike(one.ranks, scores.tolist()) for one, scores in zip(judgments, new, strict=True)]
    gains = [None if a is None or b is None else a - b for a, b in zip(after, before, strict=True)]
    paired = by_prompt(judgments, gains)
    if not paired:
        return {"heldout_prompts": 0, "promoted": False}
    gain = Mean.of(paired)
    return {
        "heldout_prompts": gain.count,
        "accuracy_in_service": float(np.mean(by_prompt(judgments, before))),
        "accuracy_new": float(np.mean(by_prompt(judgments, after))),
        **gain.as_json("accuracy_gain"),
        "promoted": gain.value >= -margin,
    }


def worth_of_active(
    active: Sequence[Judgment],
    heldout: Sequence[Judgment],
    features: Mapping[tuple[str, str], Doubles],
    head: Doubles,
) -> Mean | None:
    """Share of held-out pairs by which labels of actively chosen prompts beat as many labels of random ones.

    From either half of the random arm, and from as many of the active arm, the head on the frozen trunk in service is
    fitted again; the other half says which of the two orders it better. None: too little was judged.

    Args:
        features: [H] of each (prompt, completion), from the trunk.
        head: [H], in service.
    """
    halves = heldout[::2], heldout[1::2]
    if not halves[1] or len(active) < len(halves[0]):
        return None
    everything = _differences(heldout, features)
    if not len(everything):
        return None
    # The same for both arms, or that of the wider pairs would hold its labels back.
    ridge = PSEUDO_PAIRS * float((everything**2).mean())
    gains: list[float | None] = []
    tested: list[Judgment] = []
    for labels, test in (halves, halves[::-1]):
        chosen = active[: len(labels)]
        at_random, actively = (_refitted(head, _differences(some, features), ridge) for some in (labels, chosen))
        for judgment in test:
            pairs = _differences([judgment], features)
            gains.append(float((_right(pairs @ actively) - _right(pairs @ at_random)).mean()) if len(pairs) else None)
            tested.append(judgment)
    values = by_prompt(tested, gains)
    return Mean.of(values) if values else None


def _differences(judgments: Sequence[Judgment], features: Mapping[tuple[str, str], Doubles]) -> Doubles:
    """[pairs, H]: the better's features less the worse's."""
    rows = [
        features[judgment.prompt, judgment.texts[i]] - features[judgment.prompt, judgment.texts[j]]
        for judgment in judgments
        for i in range(len(judgment.ranks))
        for j in range(len(judgment.ranks))
        if judgment.ranks[i] < judgment.ranks[j]
    ]
    return np.array(rows)


def _right(margins: Doubles) -> Doubles:
    return np.asarray(0.5 + 0.5 * np.sign(margins), dtype=np.float64)


def _refitted(head: Doubles, pairs: Doubles, ridge: float) -> Doubles:
    """[H]: the likeliest under Bradley-Terry with a normal prior around `head`, by Newton's method."""
    if not len(pairs):
        return head
    found = head.copy()
    for _ in range(NEWTON_STEPS):
        wrong = 0.5 - 0.5 * np.tanh(pairs @ found / 2)
        gradient = ridge * (found - head) - pairs.T @ wrong
        curvature = ridge * np.eye(len(head)) + (pairs * (wrong * (1 - wrong))[:, None]).T @ pairs
        found = found - np.linalg.solve(curvature, gradient)
    return found


def audited(judgments: Sequence[Judgment], unasked: int, reward_gains: Sequence[float]) -> dict[str, Any]:
    """The new policy against the old one, whose completions are the first and the second of each pair.

    Args:
        unasked: pairs of equal texts, which count as ties.
        reward_gains: of every pair, by the reward model in service.
    """
    wins = [0.5 + 0.5 * float(np.sign(judgment.ranks[1] - judgment.ranks[0])) for judgment in judgments]
    values = by_prompt(judgments, wins) + [0.5] * unasked
    if not values:
        return {"pairs": 0, "over_optimised": False}
    rate, reward = Mean.of(values), Mean.of(list(reward_gains))
    return {
        "pairs": rate.count,
        **rate.as_json("win_rate"),
        **reward.as_json("reward_gain"),
        "over_optimised": reward.value > 0 and rate.interval[1] < 0.5,
    }
