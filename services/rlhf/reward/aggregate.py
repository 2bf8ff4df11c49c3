"""One score from the members of an ensemble, each normalised before.

    mean             E r
    worst            min r
    mean-variance    E r - λ Var r
    entropic         -β log E exp(-r/β), E r for β to infinity and min r for β to 0

Sources: Coste et al. 2024, arXiv:2310.02743 (worst-case and uncertainty-weighted optimisation); the entropic risk
measure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlhf.reward.settings import RewardSettings
from rlhf.wire.records import Floats


@dataclass(frozen=True)
class Aggregation:
    how: str = "mean"
    variance_lambda: float = 1.0
    entropic_beta: float = 1.0
    mean: float = 0.0
    """Of the aggregate on the reference set."""
    std: float = 1.0

    def __call__(self, members: Floats) -> Floats:
        """[..., M] -> [...] float32. One member is its own aggregate."""
        if members.shape[-1] == 1:
            return members[..., 0]
        return ((aggregate(members, self) - self.mean) / self.std).astype(np.float32)

    def scaled_on(self, reference: Floats) -> Aggregation:
        """With mean 0 and standard deviation 1 over the members' scores [N, M] of the reference set."""
        values = aggregate(reference, self)
        return replace(self, mean=float(values.mean()), std=float(values.std(ddof=1)))


def aggregation_of(settings: RewardSettings) -> Aggregation:
    return Aggregation(settings.aggregation, settings.variance_lambda, settings.entropic_beta)


def aggregate(members: Floats, rule: Aggregation) -> NDArray[np.float64]:
    """[..., M] -> [...], not yet scaled."""
    scores = members.astype(np.float64)
    match rule.how:
        case "worst":
            found = scores.min(-1)
        case "mean-variance":
            found = scores.mean(-1) - rule.variance_lambda * scores.var(-1)
        case "entropic":
            least = scores.min(-1)  # taken out, so that no exponential overflows
            mean = np.exp(-(scores - least[..., None]) / rule.entropic_beta).mean(-1)
            found = least - rule.entropic_beta * np.log(mean)
        case _:
            found = scores.mean(-1)
    return np.asarray(found, dtype=np.float64)
