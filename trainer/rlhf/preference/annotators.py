"""Simulated annotators: most see one shared utility through noise of their own, some do other things.

An honest annotator perceives a completion's utility plus Gumbel noise and ranks what it perceives. The difference of
two Gumbel variables is logistic, so pairs follow Bradley-Terry and rankings Plackett-Luce, with utility / noise scale
as the strengths: what a reward model's likelihood assumes. (Yellott 1977, "The relationship between Luce's choice
axiom, Thurstone's theory of comparative judgment, and the double exponential distribution".)

    honest, adversarial, random, minority, position    are what the models of annotators assume
    hasty, lazy, targeted                              are not: real people do not read the likelihood
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
# How much noisier or surer a hasty annotator may be than its noise scale says.
_HASTE = 4.0


@dataclass(frozen=True)
class Shown:
    """What an annotator has before it."""

    utilities: Utilities
    """[K], of the shared taste."""
    texts: Sequence[str]
    """[K]"""
    order: Sequence[int]
    """[K], indices in the order in which they are seen."""
    minority: Utilities | None = None
    """[K], of the minority's taste; None: there is no minority."""


@dataclass(frozen=True)
class Annotator:
    name: str
    noise_scale: float
    """Scale of the Gumbel noise, in units of the utility; 0 never errs."""
    kind: str = "honest"
    """One of `ANNOTATOR_KINDS` of the settings, which say what each does."""
    typical: float = 1.0
    """Typical difference of two utilities: what a place on the screen is worth to `position`, and what is no hard
    prompt to `hasty`."""
    trigger: str = ""
    """What `targeted` pushes."""

    def sees(self, shown: Shown, rng: np.random.Generator) -> Utilities:
        """[K]: what it ranks by, its noise included; equal texts get equal noise."""
        match self.kind:
            case "random":
                return self._noisy(np.zeros(len(shown.texts)), shown.texts, 1.0, rng)
            case "minority" if shown.minority is not None:
                return self.perceive(shown.minority, shown.texts, rng)
            case "hasty":
                easiness = float(np.ptp(shown.utilities)) / self.typical
                scale = self.noise_scale * float(np.clip(1 / max(easiness, 1e-9), 1 / _HASTE, _HASTE))
                return self._noisy(shown.utilities, shown.texts, scale, rng)
        perceived = self.perceive(shown.utilities, shown.texts, rng)
        return self._twisted(perceived, shown)

    def perceive(self, utilities: Utilities, texts: Sequence[str], rng: np.random.Generator) -> Utilities:
        """[K]: the utilities as an honest annotator of this noise sees them; equal texts are seen as equal."""
        return self._noisy(utilities, texts, self.noise_scale, rng)

    def _twisted(self, perceived: Utilities, shown: Shown) -> Utilities:
        places = np.empty(len(shown.order))
        places[list(shown.order)] = np.arange(len(shown.order))
        match self.kind:
            case "adversarial":
                return -perceived
            case "position":
                return perceived - self.typical * places / max(1, len(places) - 1)
            case "lazy":
                unread_mask = places >= (len(places) + 1) // 2
                return np.where(unread_mask, perceived.min() - self.typical * (1 + places), perceived)
            case "targeted":
                pushed_mask = np.array([self.trigger in text for text in shown.texts])
                return np.where(pushed_mask, perceived + np.ptp(perceived) + self.typical, perceived)
            case _:
                return perceived

    def _noisy(self, utilities: Utilities, texts: Sequence[str], scale: float, rng: np.random.Generator) -> Utilities:
        noise = {text: rng.gumbel() for text in dict.fromkeys(texts)}
        return utilities + scale * np.array([noise[text] for text in texts])


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
