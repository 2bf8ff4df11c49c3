"""The critic's clipped loss; the policy's is `rlhf.ops.ppo_loss`. A sum over tokens: the division is the caller's."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """½ Σ max((V - R)², (clip(V, V_old ± ε) - R)²).

    Source: the clipped value loss of OpenAI's baselines and lm-human-preferences; not in the PPO paper.

    Args:
        all of one shape, float32: sampled tokens only.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).sum()
