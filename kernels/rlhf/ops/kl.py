"""Estimates of KL(policy ‖ reference) from one sampled token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3", "abs"]


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) in nats, of a token sampled from the policy.

    With d = logprobs - ref_logprobs: k1 = d (unbiased), k2 = d²/2 (biased, low variance), k3 = exp(-d) - 1 + d
    (unbiased, never negative), abs = |d| (biased upwards; what some trainers use by default).

    Source: J. Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs, ref_logprobs: same shape, floating.

    Raises:
        ValueError: the estimator has no such name.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        # expm1 keeps the digits that exp(-d) - 1 loses for small d.
        return torch.expm1(-d) + d
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"estimator: one of k1, k2, k3, abs expected, {estimator!r} received")
