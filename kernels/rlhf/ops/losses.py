"""PPO's loss of the policy, once: eager trainers and the fused operator both call it.

Everything is a sum over tokens and leaves the division to the caller: a minibatch may be spread over several
micro-batches, and a mean of means would weigh tokens unequally. Padding never enters a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.ops.kl import kl_penalty
from rlhf.ops.output import LogprobOutput

LossKl = Literal["k1", "k2", "k3", "abs", "exact"]


@dataclass(frozen=True)
class PpoTerms:
    """What the loss is made of."""

    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low,"""
    clip_high: float = 0.2
    """and below 1 + clip_high."""
    kl_coef: float = 0.0
    """Nats of KL(policy ‖ reference) per unit of loss; 0: no such term."""
    kl_estimator: LossKl = "exact"
    """`exact` is over the whole vocabulary; the others see the sampled token (`kl_penalty`)."""
    entropy_coef: float = 0.0
    """Of the entropy, which lowers the loss."""
    dual_clip: float | None = None
    """A token with advantage A < 0 costs at most -A times this, however large its ratio. None: no such bound."""
    ratio: bool = True
    """False: -A log p instead of the clipped ratio (`policy_gradient_loss`); old log-probs and clips mean nothing."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ max(-A ρ, -A clip(ρ, 1 - clip_low, 1 + clip_high)) with ρ = exp(logprobs - old_logprobs); with `dual_clip` c,
    where A < 0, at most -A c.

    The plain loss has no bound where A < 0: a token that old weights held for impossible may outweigh all others.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; two clip ranges: Yu et al. 2025,
    "DAPO", eq. 10; dual clip: Ye et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement
    Learning", section "Dual-clip PPO", arXiv:1912.09729.

    Args:
        all of one shape, float32, the mask bool; what lies outside the mask is ignored, NaN included.
        dual_clip: above 1 + clip_high, or it would undo the clip. None: no such bound.

    Returns:
        the sum (scalar), and a bool mask of tokens whose ratio the clip held back.
    """
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    advantages = torch.where(response_mask, advantages, 0.0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped_mask = response_mask & (clipped > unclipped)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded_mask = (advantages < 0) & (losses > bound)
        losses, clipped_mask = torch.where(bounded_mask, bound, losses), clipped_mask | bounded_mask
    return losses.sum(), clipped_mask


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Σ -A log p, a scalar; at ρ = 1 its gradient is that of `policy_loss`.

    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms"; Mnih et al. 2016, "Asynchronous Methods
    for Deep Reinforcement Learning", section 4.

    Args:
        see `policy_loss`.
    """
    advantages = torch.where(response_mask, advantages, 0.0)
    return -(advantages * torch.where(response_mask, logprobs, 0.0)).sum()


def ppo_loss(
    tokens: LogprobOutput, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, terms: PpoTerms
) -> tuple[Tensor, Tensor]:
    """`policy_loss` (or `policy_gradient_loss`) + kl_coef Σ KL - entropy_coef Σ entropy.

    The KL term's gradient: of `exact` that of the true KL; of an estimator that of the estimate, as trainers use it,
    which for k1 is 0 in expectation and for k2 and k3 points the KL's way near the reference.

    Args:
        tokens: with the fields that the terms need.
        others: see `policy_loss`.

    Raises:
        ValueError: the terms need what `tokens` lacks.
    """
    if terms.ratio:
        loss, clipped_mask = policy_loss(
            tokens.logprobs, old_logprobs, advantages, response_mask, terms.clip_low, terms.clip_high, terms.dual_clip
        )
    else:
        loss = policy_gradient_loss(tokens.logprobs, advantages, response_mask)
        clipped_mask = torch.zeros_like(response_mask)
    if terms.kl_coef:
        loss = loss + terms.kl_coef * torch.where(response_mask, _kl(tokens, terms.kl_estimator), 0.0).sum()
    if terms.entropy_coef:
        if tokens.entropy is None:
            raise ValueError("entropy_coef: not 0, but the tokens' entropy was not computed")
        loss = loss - terms.entropy_coef * torch.where(response_mask, tokens.entropy, 0.0).sum()
    return loss, clipped_mask


def _kl(tokens: LogprobOutput, estimator: LossKl) -> Tensor:
    if estimator == "exact":
        if tokens.kl is None:
            raise ValueError("kl_estimator: 'exact' needs the reference's whole distribution (ref_hidden_states)")
        return tokens.kl
    if tokens.ref_logprobs is None:
        raise ValueError(f"kl_estimator: {estimator!r} needs the reference's log-probs, or kl_coef 0")
    return kl_penalty(tokens.logprobs, tokens.ref_logprobs, estimator)
