"""The clipped losses of PPO, as means over sampled tokens. Padding never enters a mean.

Both return the sum over the mask and leave the division to the caller: a minibatch may be spread over several
micro-batches, and a mean of means would weigh tokens unequally.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Σ max(-A ρ, -A clip(ρ, 1 ± ε)) with ρ = exp(logprobs - old_logprobs).

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.

    Args:
        all [B, T] float32, the mask bool; what lies outside the mask is ignored, NaN included.

    Returns:
        the sum (scalar), and a bool [B, T] mask of tokens whose ratio the clip held back.
    """
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    advantages = torch.where(response_mask, advantages, 0.0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    clipped_mask = response_mask & (clipped > unclipped)
    return torch.maximum(unclipped, clipped).sum(), clipped_mask


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip_range: float) -> Tensor:
    """½ Σ max((V - R)², (clip(V, V_old ± ε) - R)²).

    Source: the clipped value loss of OpenAI's baselines and lm-human-preferences; not in the PPO paper.

    Args:
        all [B, T] float32, the mask bool; what lies outside the mask is ignored, NaN included.
    """
    # Before the squares: a gradient through them would be 0 times NaN.
    values, old_values, returns = (torch.where(response_mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).sum()
