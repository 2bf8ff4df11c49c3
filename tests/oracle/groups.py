"""Expectations over the groups of completions that GRPO compares."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_STD_EPSILON = 1e-4


def expected_group_advantages(probability: Tensor, returns: Tensor, completions: int, divided: bool) -> Tensor:
    """[X, Y]: E[(R_1 - mean R) / (std R + ε)] over all K - 1 other completions, for each that the first may be.

    The standard deviation is the one with Bessel's correction; `divided` False leaves the division out.

    Args:
        probability, returns: [X, Y]
    """
    found = []
    for p, r in zip(probability, returns, strict=True):
        grids = torch.meshgrid(*[r] * completions, indexing="ij")
        group = torch.stack(grids, -1)
        advantage = group[..., 0] - group.mean(-1)
        if divided:
            advantage = advantage / (group.std(-1) + GROUP_STD_EPSILON)
        for _ in range(completions - 1):
            advantage = advantage @ p
        found.append(advantage)
    return torch.stack(found)
