"""Losses over all pairs of a ranking: Bradley-Terry, with a margin, and scaled by strength.

P(i above j) = σ(r_i - r_j). A ranking of K completions counts K - 1, as much as it orders, spread evenly over its
K (K - 1) / 2 pairs. Each loss has its definition, a loop, and the same computed at once.

Sources: Ouyang et al. 2022, arXiv:2203.02155, section 3.1 (all pairs of one prompt together); Liu et al. 2024,
arXiv:2410.05328, on what leaving ties out does to strengths; Touvron et al. 2023, arXiv:2307.09288, equation 2
(margin); Wang et al. 2024, arXiv:2410.01257 (scaled Bradley-Terry).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.preference.rankings import Rankings


def bradley_terry(utilities: Tensor, ranks: Sequence[int]) -> Tensor:
    """The definition: loss of one ranking, a scalar. A tie is a target of one half: it pulls the two together.

    Args:
        utilities: [K].
        ranks: [K], 1 = best, equal = tie.
    """
    total = utilities.new_zeros(())
    for i, j in itertools.combinations(range(len(ranks)), 2):
        target = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
        difference = utilities[i] - utilities[j]
        total = total - target * logsigmoid(difference) - (1 - target) * logsigmoid(-difference)
    return total * 2 / len(ranks)


def bradley_terry_margin(utilities: Tensor, ranks: Sequence[int], margin: float) -> Tensor:
    """The definition: what lies above must do so by the margin. Ties have none."""
    total = utilities.new_zeros(())
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if ranks[i] < ranks[j]:
            total = total - logsigmoid(utilities[i] - utilities[j] - margin)
        elif ranks[i] == ranks[j]:
            total = total - 0.5 * logsigmoid(utilities[i] - utilities[j])
    return total * 2 / len(ranks)


def bradley_terry_scaled(utilities: Tensor, ranks: Sequence[int], strength: float) -> Tensor:
    """The definition: a pair counts as often as it is strong."""
    return strength * bradley_terry(utilities, ranks)


def all_pairs_nll(utilities: Tensor, rankings: Rankings) -> Tensor:
    """[..., R]: `bradley_terry` of every ranking.

    Args:
        utilities: [..., R, K].
    """
    return _shared(_losses(utilities, rankings, utilities.new_zeros(len(rankings))), rankings)


def margin_nll(utilities: Tensor, rankings: Rankings, unit: float) -> Tensor:
    """[..., R]: `bradley_terry_margin` with margin = unit * strength; 0 where no strength was asked."""
    return _shared(_losses(utilities, rankings, unit * rankings.strengths), rankings)


def scaled_nll(utilities: Tensor, rankings: Rankings) -> Tensor:
    """[..., R]: `bradley_terry_scaled`; strength 1 where none was asked."""
    return rankings.strengths.clamp_min(1.0) * all_pairs_nll(utilities, rankings)


def differences(utilities: Tensor) -> Tensor:
    """[..., R, K] -> [..., R, K, K]: own utility less the other's."""
    return utilities.unsqueeze(-1) - utilities.unsqueeze(-2)


def above_mask(rankings: Rankings) -> Tensor:
    """[R, K, K] bool: the own lies above the other."""
    both = rankings.mask[:, :, None] & rankings.mask[:, None, :]
    return both & (rankings.ranks[:, :, None] < rankings.ranks[:, None, :])


def tied_mask(rankings: Rankings) -> Tensor:
    """[R, K, K] bool: the two are tied; every pair once, as [i, j] with i < j."""
    both = rankings.mask[:, :, None] & rankings.mask[:, None, :]
    return (both & (rankings.ranks[:, :, None] == rankings.ranks[:, None, :])).triu(1)


def _shared(losses: Tensor, rankings: Rankings) -> Tensor:
    """[..., R, K, K] -> [..., R]: the K (K - 1) / 2 pairs share K - 1."""
    return losses.sum((-2, -1)) * 2 / rankings.mask.sum(1)


def _losses(utilities: Tensor, rankings: Rankings, margins: Tensor) -> Tensor:
    difference = differences(utilities)
    ordered = torch.where(above_mask(rankings), -logsigmoid(difference - margins[:, None, None]), 0.0)
    tied = torch.where(tied_mask(rankings), -0.5 * (logsigmoid(difference) + logsigmoid(-difference)), 0.0)
    return ordered + tied
