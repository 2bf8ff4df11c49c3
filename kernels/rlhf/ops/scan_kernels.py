"""Triton kernel for generalised advantage estimation: a reverse scan over time.

A response token maps what comes after it, (V', A'), to (V, A) = (V_t, r_t - V_t + γ V' + γλ A'); any other token maps
it to itself. Such maps, (V, A) = (v + k V', c + b V' + a A'), compose to one of the same form, so that a block of time
is one associative scan; blocks follow each other from the end, each starting from the next one's (V', A').
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _after(k2, v2, a2, b2, c2, k1, v1, a1, b1, c1):
    """The map 1 after the map 2: in a reverse scan the second argument is the earlier token."""
    return k1 * k2, v1 + k1 * v2, a1 * a2, b1 * k2 + a1 * b2, c1 + b1 * v2 + a1 * c2


@triton.jit
def gae_scan(
    rewards,
    values,
    response_mask,
    advantages,
    rewards_stride,
    values_stride,
    mask_stride,
    advantages_stride,
    tokens,
    gamma,
    lam,
    BLOCK: tl.constexpr,
):
    """One row a program; advantages [B, T] float32, 0 outside the mask."""
    row = tl.program_id(0).to(tl.int64)
    next_value = tl.zeros([], tl.float32)
    next_advantage = tl.zeros([], tl.float32)
    blocks = tl.cdiv(tokens, BLOCK)
    for i in range(blocks):
        at = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        there = at < tokens
        counts = tl.load(response_mask + row * mask_stride + at, mask=there, other=0) != 0
        reward = tl.load(rewards + row * rewards_stride + at, mask=counts, other=0.0).to(tl.float32)
        value = tl.load(values + row * values_stride + at, mask=counts, other=0.0).to(tl.float32)
        k = tl.where(counts, 0.0, 1.0)
        a = tl.where(counts, gamma * lam, 1.0)
        b = tl.where(counts, gamma, 0.0)
        k, v, a, b, c = tl.associative_scan((k, value, a, b, reward - value), 0, _after, reverse=True)
        value_here = v + k * next_value
        advantage = c + b * next_value + a * next_advantage
        tl.store(advantages + row * advantages_stride + at, tl.where(counts, advantage, 0.0), mask=there)
        first = tl.arange(0, BLOCK) == 0
        next_value = tl.sum(tl.where(first, value_here, 0.0), axis=0)
        next_advantage = tl.sum(tl.where(first, advantage, 0.0), axis=0)
