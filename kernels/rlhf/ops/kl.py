"""Estimates of KL(policy ‖ reference) from one sampled token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3", "abs"]

# exp(80) and its square's product with a small coefficient are finite in float32; exp(89) is not.
LARGEST_LOG_RATIO = 80.0


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) in nats, of a token sampled from the policy.

    With d = logprobs - ref_logprobs: k1 = d (unbiased), k2 = d²/2 (biased, low variance), k3 = exp(-d) - 1 + d
    (unbiased, never negative), abs = |d| (biased upwards; what some trainers use by default).

    k3 is a series for small d, where the terms of exp(-d) - 1 + d cancel, and goes on as its tangent where d is below
    -80, so that value and gradient stay finite.

    Source: J. Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs, ref_logprobs: same shape, floating; 16-bit ones are computed in float32.

    Raises:
        ValueError: the estimator has no such name, or the shapes differ.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"ref_logprobs: shape {tuple(logprobs.shape)} expected, {tuple(ref_logprobs.shape)} received")
    d = logprobs - ref_logprobs
    d = d.to(torch.promote_types(d.dtype, torch.float32))
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return _k3(d)
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"estimator: one of k1, k2, k3, abs expected, {estimator!r} received")


def _k3(d: Tensor) -> Tensor:
    # Each branch sees only what it is right for: a gradient through the branch not taken would be 0 times infinity.
    small_mask, huge_mask = d.abs() < 0.03, d < -LARGEST_LOG_RATIO
    small = torch.where(small_mask, d, 0.0)
    series = small.square() * (0.5 - small * (1 / 6 - small * (1 / 24 - small / 120)))
    held = d.clamp_min(-LARGEST_LOG_RATIO)
    plain = torch.expm1(-held) + held
    slope = 1.0 - torch.exp(torch.tensor(LARGEST_LOG_RATIO, dtype=d.dtype))
    tangent = torch.where(huge_mask, d + LARGEST_LOG_RATIO, 0.0) * slope.to(d.device)
    return torch.where(small_mask, series, plain + tangent)
