"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages A_t = δ_t + γλ A_{t'} with δ_t = r_t + γ V_{t'} - V_t.

    t' is the next response token, and V after the last one is 0. Tokens outside the mask are skipped, as if the
    response tokens stood end to end: a prompt, padding, or the answer of a tool between two turns neither ends nor
    discounts anything. Their advantages are 0.

    Source: Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.

    Args:
        rewards, values: [B, T] float32; values[b, t] is the value of the state before token t is sampled.
        response_mask: [B, T] bool.

    Returns:
        [B, T] float32.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        counts = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(counts, advantage, 0.0)
        next_value = torch.where(counts, values[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
    return advantages
