"""What can be said of each annotator, and how surely: honest, dissenting, adversarial or random.

Three things are counted, each as so many right of so many pairs:

    fit      it ordered the pair as the reward model does (held out for it, if one wants to be strict)
    gold     it ordered a pair as experts do, chosen so that no honest taste would have it otherwise
    repeats  it ordered a pair that it had seen before as it did then

A careless annotator is at chance in all three. Dissenters and adversaries both repeat themselves and both do not fit;
gold tells them apart. Without gold and repeats the careless, the dissenting and the adversarial cannot be told apart,
and nobody is called anything: whoever has no class of probability `SURE` is `undecided`.

The probability of a class is by Bayes' rule from beta-binomial likelihoods; RATES has what is expected of each class.
The K (K - 1) / 2 pairs of a ranking say as much as K - 1 that are independent, so they count 2 / K each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

CLASSES = ("honest", "dissenting", "random", "adversarial")
BAD = frozenset(("random", "adversarial"))
SURE = 0.8
_STEPS = 2000
"""In which an interval is found."""
RATES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "fit": {"honest": (16, 4), "dissenting": (4, 4), "random": (40, 40), "adversarial": (2, 8)},
    "gold": {"honest": (9, 1), "dissenting": (9, 1), "random": (40, 40), "adversarial": (1, 9)},
    "repeats": {"honest": (8, 2), "dissenting": (8, 2), "random": (40, 40), "adversarial": (8, 2)},
}
"""Beta distribution of each rate within each class. A random clicker is at one half, give or take a twentieth."""
PRIOR: Mapping[str, float] = {"honest": 0.6, "dissenting": 0.2, "random": 0.12, "adversarial": 0.08}


@dataclass
class Count:
    """Right ones of so many, in independent pairs."""

    right: float = 0.0
    of: float = 0.0

    def add(self, own: Sequence[float], other: Sequence[float]) -> None:
        """How a ranking orders the pairs that another order of the same items orders too; higher is better in both."""
        pairs = [(i, j) for i, j in combinations(range(len(own)), 2) if own[i] != own[j] and other[i] != other[j]]
        share = 2 / len(own)
        self.right += share * sum((own[i] > own[j]) == (other[i] > other[j]) for i, j in pairs)
        self.of += share * len(pairs)

    @property
    def rate(self) -> float | None:
        return self.right / self.of if self.of else None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Of the rate, with Jeffreys' prior."""
        rates = (np.arange(_STEPS) + 0.5) / _STEPS
        logs = (self.right - 0.5) * np.log(rates) + (self.of - self.right - 0.5) * np.log1p(-rates)
        below = np.cumsum(np.exp(logs - logs.max()))
        low, high = np.searchsorted(below / below[-1], [(1 - level) / 2, (1 + level) / 2])
        return float(rates[low]), float(rates[high])


@dataclass
class Evidence:
    """Of one annotator."""

    fit: Count = field(default_factory=Count)
    gold: Count = field(default_factory=Count)
    repeats: Count = field(default_factory=Count)

    def probabilities(self) -> dict[str, float]:
        """Of CLASSES; they add up to 1."""
        logs = np.array(
            [np.log(PRIOR[name]) + sum(self._log_likelihood(what, name) for what in RATES) for name in CLASSES]
        )
        shares = np.exp(logs - logs.max())
        return dict(zip(CLASSES, (shares / shares.sum()).tolist(), strict=True))

    def verdict(self) -> str:
        """The class of probability `SURE`, or `undecided`."""
        probabilities = self.probabilities()
        likeliest = max(CLASSES, key=lambda name: probabilities[name])
        return likeliest if probabilities[likeliest] >= SURE else "undecided"

    def as_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in RATES}
        return {
            "class": self.verdict(),
            "probabilities": self.probabilities(),
            **{
                name: {"rate": count.rate, "pairs": count.of, "interval": count.interval()}
                for name, count in counts.items()
            },
        }

    def _log_likelihood(self, what: str, name: str) -> float:
        count: Count = getattr(self, what)
        a, b = RATES[what][name]
        return _log_beta(a + count.right, b + count.of - count.right) - _log_beta(a, b)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
