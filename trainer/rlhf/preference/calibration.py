"""How far predicted preferences can be believed: accuracy, likelihood and calibration, and a baseline that only counts.

Everything is over pairs that an annotator ordered; ties have no side to agree with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted probability lies in [lower, upper)."""

    lower: float
    upper: float
    pairs: int
    predicted: float
    """Mean probability."""
    observed: float
    """Share in which the annotator agreed."""


def accuracy(margins: Floats) -> float:
    """Share of pairs that are ordered as the annotator did; an equal score is half right.

    Args:
        margins: [P], score of what the annotator put above less the other's.
    """
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def mean_nll(margins: Floats) -> float:
    """Nats per pair: -log sigmoid(margin)."""
    return float(np.logaddexp(0.0, -margins).mean())


def brier(margins: Floats) -> float:
    """Mean squared distance of the predicted probability from what the annotator said (Brier 1950)."""
    return float(np.mean((1.0 / (1.0 + np.exp(np.clip(margins, -500, 500)))) ** 2))


def reliability(margins: Floats, bins: int = 10) -> list[Bin]:
    """Every pair counts in both orders, since which completion comes first means nothing; empty bins are left out."""
    p = 1.0 / (1.0 + np.exp(-np.clip(margins, -500, 500)))
    predicted = np.concatenate([p, 1.0 - p])
    observed = np.concatenate([np.ones_like(p), np.zeros_like(p)])
    number = np.minimum((predicted * bins).astype(int), bins - 1)
    return [
        Bin(
            lower=b / bins,
            upper=(b + 1) / bins,
            pairs=int((number == b).sum()),
            predicted=float(predicted[number == b].mean()),
            observed=float(observed[number == b].mean()),
        )
        for b in np.unique(number).tolist()
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Mean distance of predicted from observed, weighted by pairs (Guo et al. 2017, equation 3)."""
    total = sum(each.pairs for each in bins)
    return sum(each.pairs * abs(each.predicted - each.observed) for each in bins) / total


def length_only_accuracy(train: Mapping[str, Floats], heldout: Mapping[str, Floats]) -> tuple[float, str]:
    """Accuracy of the best rule that knows one length: which length, and whether more or less of it is better, is
    chosen on the training pairs.

    Args:
        train, heldout: by name of a length: [P], length of what the annotator put above less the other's.

    Returns:
        Held-out accuracy, and the rule in words.
    """
    rules = [(name, sign) for name in train for sign in (1.0, -1.0)]
    name, sign = max(rules, key=lambda rule: accuracy(rule[1] * train[rule[0]]))
    return accuracy(sign * heldout[name]), f"{'more' if sign > 0 else 'fewer'} {name}"


def calibration_figures(margins: Floats) -> dict[str, Any]:
    """For the stage's report."""
    bins = reliability(margins)
    return {
        "nll": mean_nll(margins),
        "ece": expected_calibration_error(bins),
        "calibration": [vars(each) for each in bins],
    }
