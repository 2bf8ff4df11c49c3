"""The decoupled objective: what older weights sampled counts by its importance.

PPO's old policy has two tasks: it says how probable a token was when it was sampled, and what the new policy is held
near. Where rollouts are stale, the same policy cannot do both: near the old one, the clip holds the new one back from
where it already is. Decoupled, with the behaviour policy β that sampled and the proximal policy, the weights before the
step:

    Σ (π_prox / π_β) · max(-Â ρ, -Â clip(ρ, 1 - ε, 1 + ε))  with  ρ = π / π_prox

The weight is constant and not negative, so it is the advantages that are multiplied by it.

Source: Hilton, Cobbe and Schulman 2021, "Batch size-invariance for policy optimization", arXiv:2110.00641, section
"Decoupled policy objectives"; in asynchronous RLHF with the recomputed proximal policy: Fu et al. 2025, "AReaL",
arXiv:2505.24298. Truncation, which trades variance for bias: Ionides 2008, "Truncated Importance Sampling"; Espeholt et
al. 2018, "IMPALA", arXiv:1802.01561.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.ppo.experience import Experience
from rlhf.ppo.settings import PpoSettings


@dataclass(frozen=True)
class Importance:
    """Of each token under the weights before the step."""

    weights: Tensor
    """[N] float32, min(π_prox / π_β, cap); 1 outside the response mask."""
    capped_fraction: float
    """Share of sampled tokens whose weight the cap lowered."""


def importance_of(proximal_logprobs: Tensor, experience: Experience, settings: PpoSettings) -> Importance | None:
    """None where the objective is PPO's own.

    Args:
        proximal_logprobs: [N], of the trainer's weights before the step.
    """
    if settings.objective == "ppo":
        return None
    mask = experience.response_mask
    ratio = torch.where(mask, proximal_logprobs - experience.service_logprobs, 0.0).exp()
    capped = (ratio > settings.importance_cap)[mask].float().mean().item()
    return Importance(ratio.clamp_max(settings.importance_cap), capped)
