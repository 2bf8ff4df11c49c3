"""Means with intervals, and how varied texts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 10_000
_AT_ONCE = 1_000


def bootstrap_interval(values: ArrayLike, seed: int, coverage: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values; of paired differences for a paired gain.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.

    Args:
        values: [N], at least one.
    """
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    blocks = range(_RESAMPLES // _AT_ONCE)
    means = np.concatenate([rng.choice(sample, size=(_AT_ONCE, len(sample))).mean(axis=1) for _ in blocks])
    low, high = np.quantile(means, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Bigrams:
    """Word pairs of a collection of texts."""

    distinct: int
    total: int

    @property
    def distinct_share(self) -> float:
        """0 if there are none. Low where texts repeat themselves or each other, as those of a collapsed policy do.
        Only comparable between collections of about the same size.

        Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", distinct-2.
        """
        return self.distinct / self.total if self.total else 0.0


def bigrams(texts: Sequence[str]) -> Bigrams:
    """Words are what white space divides, in lower case; no pair spans two texts."""
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return Bigrams(len(set(pairs)), len(pairs))
