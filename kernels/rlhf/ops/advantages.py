"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ops.dispatch import launch, uses_triton


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages A_t = δ_t + γλ A_{t'} with δ_t = r_t + γ V_{t'} - V_t.

    t' is the next response token, and V after the last one is 0. Tokens outside the mask are skipped, as if the
    response tokens stood end to end: a prompt, padding, or the answer of a tool between two turns neither ends nor
    discounts anything. Their advantages are 0, and what lies there is ignored, NaN included.

    Source: Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.

    Args:
        rewards, values: [B, T] float32; values[b, t] is the value of the state before token t is sampled.
        response_mask: [B, T] bool.

    Returns:
        [B, T] float32, without gradient on a GPU.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if rewards.dim() != 2 or values.shape != rewards.shape or response_mask.shape != rewards.shape:
        raise ValueError(
            "rewards, values, response_mask: one shape [B, T] expected, "
            f"{tuple(rewards.shape)}, {tuple(values.shape)}, {tuple(response_mask.shape)} received"
        )
    if response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask: bool expected, {response_mask.dtype} received")
    if uses_triton(rewards):
        return _scan(rewards.detach(), values.detach(), response_mask, gamma, lam)
    return gae_definition(rewards, values, response_mask, gamma, lam)


def gae_definition(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> Tensor:
    """`gae` as the obvious loop."""
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


def _scan(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> Tensor:
    from rlhf.ops import scan_kernels

    rewards, values, mask = rewards.contiguous(), values.contiguous(), response_mask.contiguous().view(torch.uint8)
    advantages = torch.empty_like(rewards, dtype=torch.float32)
    batch, tokens = rewards.shape
    launch(
        scan_kernels.gae_scan, batch, rewards,
        rewards, values, mask, advantages, rewards.stride(0), values.stride(0), mask.stride(0), advantages.stride(0),
        tokens, float(gamma), float(lam), BLOCK=min(1024, 1 << max(0, tokens - 1).bit_length()),
    )  # fmt: skip
    return advantages
