"""Simulated annotators: they see one shared utility through noise of their own.

An annotator perceives a completion's utility plus Gumbel noise and ranks what it perceives. The difference of two
Gumbel variables is logistic, so pairs follow Bradley-Terry and rankings Plackett-Luce, with utility / noise scale as
the strengths: what a reward model's likelihood assumes. (Yellott 1977, "The relationship between Luce's choice axiom,
Thurstone's theory of comparative judgment, and the double exponential distribution".)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Utilities = NDArray[np.float64]

# Beyond this multiple of the typical difference an annotator's order says nothing of the utility.
_WIDEST = 1e6
_HALVINGS = 100


@dataclass(frozen=True)
class Annotator:
    name: str
    noise_scale: float
    """Scale of the Gumbel noise, in units of the utility; 0 never errs."""

    def perceive(self, utilities: Utilities, texts: Sequence[str], rng: np.random.Generator) -> Utilities:
        """[K]: the utilities as this annotator sees them; equal texts are seen as equal."""
        noise = {text: rng.gumbel() for text in dict.fromkeys(texts)}
        return utilities + self.noise_scale * np.array([noise[text] for text in texts])


def pair_differences(utilities: Sequence[Utilities]) -> NDArray[np.float64]:
    """|u_i - u_j| > 0 over the pairs of completions of each prompt; pairs of equal utility have no order."""
    differences = [abs(a - b) for of_prompt in utilities for a, b in combinations(of_prompt.tolist(), 2)]
    return np.array([difference for difference in differences if difference > 0])


def mean_reliability(differences: NDArray[np.float64], noise_scale: float) -> float:
    """Mean probability of ordering a pair as the utility does: the mean of σ(difference / noise scale)."""
    if noise_scale == 0:
        return 1.0
    # σ(x) as tanh does not overflow where the scale is tiny.
    return float(np.mean(0.5 + 0.5 * np.tanh(differences / (2 * noise_scale))))


def noise_scale_for(reliability: float, differences: NDArray[np.float64]) -> float:
    """The noise scale at which `mean_reliability` is the one given, by bisection on its logarithm.

    Args:
        reliability: from 0.5 (guesses) to 1 (never errs).
        differences: [pairs], > 0, at least one.
    """
    if reliability == 1:
        return 0.0
    typical = float(np.mean(differences))
    low, high = np.log(typical / _WIDEST), np.log(typical * _WIDEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if mean_reliability(differences, float(np.exp(middle))) > reliability:
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def ranks_of(perceived: Utilities, tie_margin: float) -> tuple[int, ...]:
    """[K] ranks, 1 = best. A completion shares the rank of the best one above it that is within the margin.

    So no two of one rank are further apart than the margin, as they could be if ties were passed on along a chain.
    """
    ranks = [0] * len(perceived)
    rank, best = 0, np.inf
    for index in np.argsort(-perceived, kind="stable"):
        if best - perceived[index] > tie_margin:
            rank, best = rank + 1, perceived[index]
        ranks[index] = rank
    return tuple(ranks)
