"""Reward and judge as functions of the distance from the initial policy: best-of-n without bias, the bound on its KL,
and two forms of curves with their optimum.

    R_bon(d) = d (α − β d)          R_RL(d) = d (α − β log d)          d = √KL(policy ‖ initial policy)

R is relative to the initial policy, so R(0) = 0. Both forms are linear in α and β: least squares has a closed form.

Source: Gao, Schulman and Hilton 2023, "Scaling Laws for Reward Model Overoptimization".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import DataError
from rlhf.evaluate.results import Fit, Form, Interval

Floats = NDArray[np.float64]

FEWEST_POINTS = 4
"""Two pass through any two points, so two more have to say whether the form fits."""
_LEAST_SPREAD = 1.5
"""Largest over smallest distance. Closer together, d and d² or d and d log d cannot be told apart."""
SPEAKS_OF = 10.0
"""A peak this many times as far as the farthest point is taken for none. Where β is almost 0, d* of the RL form has
dozens of digits."""
_LEAST_KL = 1e-8
"""Nats. Below it a policy has not moved."""
_RESAMPLES = 2_000
_CURVE_POINTS = 61


def best_of_n_kl_bound(n: int) -> float:
    """log n − (n − 1) / n nats: an upper bound of KL(best of n ‖ policy), whatever the scores.

    It is the KL itself where no two completions have the same score, which asks for infinitely many completions. With
    few likely ones it is loose: the KL cannot exceed −log of the best one's probability, and the bound knows no limit.

    Source: Stiennon et al. 2020, appendix G.3; that it is a bound: Beirami et al. 2024, "Theoretical guarantees on the
    best-of-n alignment policy".
    """
    return math.log(n) - (n - 1) / n


def best_of_n_means(scores: ArrayLike, values: ArrayLike, ns: Sequence[int]) -> Floats:
    """[len(ns), P]: for each prompt the mean value of the completion with the best score among n, without bias.

    It is the average over every subset of n of the N samples. Sorted by score, the i-th of N (i = 1 the lowest) is the
    best of C(i−1, n−1) of the C(N, n) subsets. Equal scores take turns, as if each tie were decided by lot.

    Source: Nakano et al. 2021, "WebGPT", and Gao, Schulman and Hilton 2023, in their appendices on best-of-n.

    Args:
        scores: [P, N] what is chosen by.
        values: [P, N] what is averaged of the chosen; the scores themselves for the mean best score.
        ns: each from 1 to N.

    Raises:
        ValueError: an n is larger than N, or the shapes differ.
    """
    by, of = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    if by.shape != of.shape or by.ndim != 2:
        raise ValueError(f"values: shape {by.shape} of the scores, [P, N], expected; {of.shape} received")
    samples = by.shape[1]
    wrong = [n for n in ns if not 1 <= n <= samples]
    if wrong:
        raise ValueError(f"ns: 1 to {samples}, the number of samples, expected; {wrong[0]} received")
    weights = np.array([_subset_shares(n, samples) for n in ns])
    ascending = np.array([_ascending(*row) for row in zip(by, of, strict=True)])
    means: Floats = weights @ ascending.T
    return means


def _subset_shares(n: int, samples: int) -> list[float]:
    """[N]: the share of the subsets of n whose best is the i-th. Quotients of whole numbers, so nothing overflows."""
    subsets = math.comb(samples, n)
    return [math.comb(below, n - 1) / subsets for below in range(samples)]


def _ascending(scores: Floats, values: Floats) -> Floats:
    """[N]: values in the order of their scores; those of equal scores replaced by their mean."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    means = np.bincount(group, weights=values) / sizes
    return np.repeat(means, sizes)


@dataclass(frozen=True)
class Resamples:
    """Bootstrap resamples of the prompts, the same ones for everything that was measured on them."""

    weights: Floats
    """[B, P]: share of each prompt in each resample."""

    @classmethod
    def draw(cls, prompts: int, seed: int, count: int = _RESAMPLES) -> Self:
        drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=count)
        return cls(drawn / prompts)

    def means(self, values: Floats) -> Floats:
        """[B, M] from [M, P]."""
        means: Floats = self.weights @ values.T
        return means


def percentile_interval(draws: Floats, coverage: float = 0.95) -> Interval:
    """Of values of which some may be infinite; None stands for infinity, as JSON knows none."""
    low = float(np.quantile(draws, (1 - coverage) / 2, method="lower"))
    high = float(np.quantile(draws, (1 + coverage) / 2, method="higher"))
    return finite(low), finite(high)


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def gain_at(form: Form, d: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> Floats:
    """R(d); 0 at d = 0."""
    first, second = _columns(form, np.asarray(d, np.float64))
    gain: Floats = np.asarray(alpha) * first + np.asarray(beta) * second
    return gain


def least_squares(form: Form, d: Floats, gain: Floats) -> tuple[Floats, Floats]:
    """α and β that minimise Σ (R(d) − gain)²: the normal equations of two columns.

    Args:
        d, gain: [..., M]; one fit for each of the leading dimensions.
    """
    u, v = _columns(form, d)
    uu, uv, vv = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    ug, vg = (u * gain).sum(-1), (v * gain).sum(-1)
    determinant = uu * vv - uv * uv
    return (vv * ug - uv * vg) / determinant, (uu * vg - uv * ug) / determinant


def optimum(form: Form, alpha: ArrayLike, beta: ArrayLike) -> tuple[Floats, Floats]:
    """d* where R is largest, and R(d*); both infinite where β ≤ 0, when the curve has no maximum.

    best-of-n: d* = α / 2β, or 0 where α < 0.  RL: log d* = α / β − 1.
    """
    a, b = np.broadcast_arrays(np.asarray(alpha, np.float64), np.asarray(beta, np.float64))
    falls_mask = b > 0
    b = np.where(falls_mask, b, 1.0)
    with np.errstate(over="ignore"):
        d = np.maximum(a, 0) / (2 * b) if form == "best_of_n" else np.exp(a / b - 1)
        gain = d * np.maximum(a, 0) / 2 if form == "best_of_n" else b * d
    return np.where(falls_mask, d, np.inf), np.where(falls_mask, gain, np.inf)


def _optimum_within(reach: float, form: Form, alpha: ArrayLike, beta: ArrayLike) -> tuple[Floats, Floats]:
    d, gain = optimum(form, alpha, beta)
    near_mask = d <= reach
    return np.where(near_mask, d, np.inf), np.where(near_mask, gain, np.inf)


def fit(form: Form, kl: Floats, gain: Floats, resamples: Resamples) -> Fit:
    """The form fitted to the means over prompts, with 95 % intervals: the fit repeated on resampled prompts.

    Intervals say what other prompts would have changed, under the form; neither what another run would have, nor
    whether the form is right. `Fit.misfit` speaks of the latter.

    Args:
        kl: [M, P] nats, at each point.
        gain: [M, P], relative to the initial policy's on the same prompt.

    Raises:
        DataError: there are too few points, or they lie too close together.
    """
    moved_mask = kl.mean(1) > _LEAST_KL
    kl, gain = kl[moved_mask], gain[moved_mask]
    _check_points(np.sqrt(kl.mean(1)))
    d, mean = np.sqrt(kl.mean(1)), gain.mean(1)
    alpha, beta = (float(found) for found in least_squares(form, d, mean))
    # Rounding may leave a KL of nearly 0 below it.
    draws = least_squares(form, np.sqrt(np.maximum(resamples.means(kl), _LEAST_KL)), resamples.means(gain))
    best_d, best_gain = (float(found) for found in _optimum_within(SPEAKS_OF * d.max(), form, alpha, beta))
    best_d_draws, best_gain_draws = _optimum_within(SPEAKS_OF * d.max(), form, *draws)
    grid = np.linspace(0.0, d.max(), _CURVE_POINTS)
    bands = gain_at(form, grid[:, None], draws[0], draws[1])
    return Fit(
        form=form,
        points=len(d),
        alpha=alpha,
        alpha_interval=percentile_interval(draws[0]),
        beta=beta,
        beta_interval=percentile_interval(draws[1]),
        optimum_d=finite(best_d),
        optimum_d_interval=percentile_interval(best_d_draws),
        optimum_gain=finite(best_gain),
        optimum_gain_interval=percentile_interval(best_gain_draws),
        optimum_share=float(np.mean(best_d_draws <= d.max())),
        farthest_d=float(d.max()),
        misfit=float(np.sqrt(np.mean((gain_at(form, d, alpha, beta) - mean) ** 2))),
        curve=tuple(
            (float(at), float(value), *np.quantile(band, [0.025, 0.975]).tolist())
            for at, value, band in zip(grid, gain_at(form, grid, alpha, beta), bands, strict=True)
        ),
    )


def _check_points(d: Floats) -> None:
    if len(d) < FEWEST_POINTS:
        raise DataError(
            f"points away from the initial policy: {len(d)}, too few for a curve of two parameters; "
            f"{FEWEST_POINTS} are needed"
        )
    if d.max() < _LEAST_SPREAD * d.min():
        raise DataError(
            f"all points lie between √KL {d.min():.3g} and {d.max():.3g}, too close together for a curve; the farthest "
            f"must be {_LEAST_SPREAD:g} times as far as the nearest"
        )


def _columns(form: Form, d: Floats) -> tuple[Floats, Floats]:
    """What α and β are multiplied by."""
    if form == "best_of_n":
        return d, -d * d
    return d, -d * np.log(np.where(d > 0, d, 1.0))
