"""Do two computations of the same log-probs agree, and if not, what does the difference look like?

Policy service, reference service and trainer each compute log-probs of one set of weights with other shapes and other
kernels. They may differ by the rounding of the coarsest number format among them, and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rlhf.wire.records import Floats

LOGPROB_BOUNDS = {"float32": 1e-3, "float16": 0.5, "bfloat16": 0.5}
"""Nats by which two computations of one log-prob may differ, at most over a batch. What the formats' rounding (2⁻²⁴,
2⁻¹¹, 2⁻⁸) of logits and of every layer's sum comes to depends on the model: on 1400 tokens of the demo's, against
float32, 5e-6, 0.012 and 0.12 at most, and 5e-7, 0.0012 and 0.0095 on average. The bounds leave four times that for
larger models, and float32, where 3e-5 was seen, more: a thousandth of a ratio harms nobody. float16 has more digits
than bfloat16, but small numbers vanish in it: a test's model with large weights differs by 0.46 at one token."""
MEAN_SHARE = 0.1
"""The mean of |difference| may be this share of the bound: rounding errs in both directions and rarely far, so
that a fault that moves every token a little shows here."""
FILTERED_NATS = 1.0
"""By which a filter may raise log-probs, to be taken for one: -log of the probability that it keeps, which is 0.22 for
a top-p of 0.8, and rarely this much."""


@dataclass(frozen=True)
class Agreement:
    """Log-probs of the same tokens from two places, given minus expected, in nats."""

    of: str
    """Who gave them."""
    mean: float
    """Of |difference|."""
    above: float
    """max(given - expected), at least 0."""
    below: float
    """max(expected - given), at least 0."""
    raw: float = math.nan
    """max |given - what would be expected at temperature 1|; NaN: the temperature is 1, or nobody looked."""

    @property
    def largest(self) -> float:
        return max(self.above, self.below)

    def within(self, bound: float) -> bool:
        """NaN is not."""
        return self.largest <= bound and self.mean <= MEAN_SHARE * bound


def logprob_bound(dtypes: Iterable[str], given: float | None = None) -> float:
    """Nats; of the coarsest of the dtypes, if none is given."""
    return max(LOGPROB_BOUNDS[dtype] for dtype in dtypes) if given is None else given


def agreement(of: str, given: Floats, expected: Floats, raw: Floats | None = None) -> Agreement:
    """
    Args:
        given, expected: [n], of the same tokens, n > 0.
        raw: [n], expected if the temperature were 1.
    """
    difference = given.astype(np.float64) - expected
    return Agreement(
        of,
        mean=float(np.abs(difference).mean()),
        # np.maximum, unlike max, lets no NaN pass for 0.
        above=float(np.maximum(difference.max(), 0)),
        below=float(np.maximum(-difference.min(), 0)),
        raw=math.nan if raw is None else float(np.abs(given.astype(np.float64) - raw).max()),
    )


def cause(found: Agreement, bound: float) -> str:
    """What a disagreement looks like; see `Agreement.within`."""
    if not math.isfinite(found.largest):
        return "some are not finite"
    if found.raw <= bound:
        return "they are those of temperature 1: the temperature was forgotten"
    if found.below <= bound and found.above <= FILTERED_NATS:
        return "all of them are higher: they were normalised over fewer tokens, as by top-p, top-k or min-p"
    return "they are higher and lower: other weights, dropout, or tokens of another tokenizer"
