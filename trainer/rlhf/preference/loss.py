"""Bradley-Terry on all pairs of a ranking: the definition, and the same computed at once for many rankings.

P(i above j) = sigmoid(r_i - r_j). A ranking of K completions counts K - 1, as much as it orders, spread evenly over its
K (K - 1) / 2 pairs; each completion is scored once. A tie is a target of one half: it pulls the two scores together.

Sources: Ouyang et al. 2022, section 3.5 (all pairs of one prompt together); Liu et al. 2024, arXiv:2410.05328, on what
leaving ties out does to strengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def bradley_terry(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """The definition: loss of one ranking, a scalar.

    Args:
        scores: [K].
        ranks: [K], 1 = best, equal = tie.
    """
    total = scores.new_zeros(())
    for i, j in itertools.combinations(range(len(ranks)), 2):
        target = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
        difference = scores[i] - scores[j]
        total = total - target * logsigmoid(difference) - (1 - target) * logsigmoid(-difference)
    pairs = len(ranks) * (len(ranks) - 1) / 2
    return total / pairs * (len(ranks) - 1)


@dataclass(frozen=True)
class Pairs:
    """All pairs of some rankings, as indices into completions laid end to end."""

    first: Tensor
    """[P] int64"""
    second: Tensor
    """[P] int64"""
    target: Tensor
    """[P] float32: 1 the first is above, 0 the second is, 0.5 a tie."""
    share: Tensor
    """[P] float32: what the pair counts; those of a ranking add up to K - 1."""

    def to(self, device: torch.device) -> Pairs:
        return Pairs(self.first.to(device), self.second.to(device), self.target.to(device), self.share.to(device))


def all_pairs(rankings: Sequence[Sequence[int]], offsets: Sequence[int]) -> Pairs:
    """
    Args:
        rankings: ranks of each, 1 = best, equal = tie; at least two in each.
        offsets: of each, the index of its first completion.
    """
    first, second, target, share = [], [], [], []
    for ranks, offset in zip(rankings, offsets, strict=True):
        for i, j in itertools.combinations(range(len(ranks)), 2):
            first.append(offset + i)
            second.append(offset + j)
            target.append(0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]))
            share.append(2.0 / len(ranks))
    return Pairs(torch.tensor(first), torch.tensor(second), torch.tensor(target), torch.tensor(share))


def bradley_terry_sum(scores: Tensor, pairs: Pairs) -> Tensor:
    """`bradley_terry` of all the rankings, summed, in float32.

    Args:
        scores: [N], of the completions that the pairs point at.
    """
    difference = scores.float()[pairs.first] - scores.float()[pairs.second]
    losses = pairs.target * softplus(-difference) + (1 - pairs.target) * softplus(difference)
    return (pairs.share * losses).sum()
