"""Which prompts are worth a judgment: some at random, the rest by what the ensemble's members disagree about.

BALD is the information that a judgment gives about which member is right: for a pair H(mean of p) - mean of H(p), with
p the member's probability that the first is better; for more completions the mean over their pairs. Not the variance of
logits, which also asks about what all members are sure of. (Houlsby et al. 2011, arXiv:1112.5745.)

A prompt is drawn with a probability that is known, so what was chosen can be weighed against what was not: the random
arm equally, the active arm in proportion to BALD, by systematic sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rlhf.wire.records import Floats

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    index: int
    """Of the candidate."""
    heldout: bool
    """Drawn at random to measure with, and so not trained on in this round."""
    source: str
    """"random" or "active"."""
    p_select: float
    """Of the held-out ones among all candidates; of the others among those that these have left."""


def bald(members: Sequence[Floats], log_odds: float) -> Doubles:
    """[N], nats: 0 where there is one member, or all agree.

    Args:
        members: [K, M] scores of each prompt.
        log_odds: of one unit of score.
    """
    return np.array([_bald(one.astype(np.float64) * log_odds) for one in members])


def _bald(scores: Doubles) -> float:
    pairs = [scores[i] - scores[j] for i, j in combinations(range(len(scores)), 2)]
    # As tanh, which does not overflow.
    p = 0.5 + 0.5 * np.tanh(np.array(pairs) / 2)
    return float(np.mean(_entropy(p.mean(1)) - _entropy(p).mean(1)))


def _entropy(p: Doubles) -> Doubles:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return np.asarray(-p * np.log(p) - (1 - p) * np.log1p(-p), dtype=np.float64)


def choose(worth: Doubles | None, candidates: int, count: int, random_share: float, seed: int) -> list[Chosen]:
    """`count` of the candidates, each at most once; those that are held out are drawn first.

    Args:
        worth: [candidates] ≥ 0, by which the others are drawn; None: at random too.
        random_share: of `count`, held out.
    """
    rng, count = np.random.default_rng(seed), min(count, candidates)
    heldout = sorted(rng.permutation(candidates)[: round(count * random_share)].tolist())
    left = np.setdiff1d(np.arange(candidates), heldout)
    source = "random" if worth is None else "active"
    shares = inclusion(np.ones(len(left)) if worth is None else worth[left], count - len(heldout))
    others = systematic(shares, rng).tolist()
    return [
        *(Chosen(index, True, "random", len(heldout) / candidates) for index in heldout),
        *(Chosen(int(left[place]), False, source, float(shares[place])) for place in others),
    ]


def is_given_up(gains: Sequence[float]) -> bool:
    """Whether the last two rounds' active labels were worth no more than as many random ones.

    Args:
        gains: of each round that measured it, earliest first.
    """
    return len(gains) >= 2 and sum(gains[-2:]) <= 0


def inclusion(worth: Doubles, count: int) -> Doubles:
    """[N] probabilities in proportion to worth, none above 1, that add up to `count`."""
    if not count:
        return np.zeros(len(worth))
    # So that everything has a probability, and what was drawn can be weighed.
    weights = worth + max(1e-3 * float(worth.mean()), 1e-9)
    sure = np.zeros(len(worth), dtype=bool)
    while True:
        shares = np.where(sure, 1.0, (count - sure.sum()) * weights / max(weights[~sure].sum(), 1e-300))
        above = (shares >= 1.0) & ~sure
        if not above.any() or sure.all():
            return np.minimum(shares, 1.0)
        sure |= above


def systematic(shares: Doubles, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices, each drawn with its probability and as many as these add up to: one step through a random order.

    Source: Madow 1949, "On the theory of systematic sampling, II".
    """
    order = rng.permutation(len(shares))
    ends = np.cumsum(shares[order])
    marks = np.arange(round(float(shares.sum()))) + rng.uniform()
    places = np.searchsorted(ends, marks, side="right")
    return np.sort(order[np.minimum(places, len(order) - 1)])
