"""Ties as an outcome of their own, with a parameter that is fitted: Davidson's form and Rao and Kupper's, on all pairs.

Davidson:       P(i above j), P(j above i), P(tie) = softmax[Δ/2, -Δ/2, log ν]
Rao and Kupper: P(i above j) = σ(Δ - α), P(j above i) = σ(-Δ - α), the rest is a tie:
                P(tie) = (e^{2α} - 1) σ(Δ - α) σ(-Δ - α), α > 0 the difference that is not noticed

A ranking of K completions counts K - 1, spread evenly over its pairs.

Sources: Davidson 1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments"; Rao
and Kupper 1967, "Ties in paired-comparison experiments: a generalization of the Bradley-Terry model".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.preference.pairwise import above_mask, differences, tied_mask
from rlhf.preference.rankings import Rankings


def davidson(utilities: Tensor, ranks: Sequence[int], log_nu: Tensor) -> Tensor:
    """The definition: loss of one ranking, a scalar."""
    total = utilities.new_zeros(())
    for i, j in itertools.combinations(range(len(ranks)), 2):
        half = (utilities[i] - utilities[j]) / 2
        outcome = 2 if ranks[i] == ranks[j] else int(ranks[i] > ranks[j])
        total = total - torch.log_softmax(torch.stack([half, -half, log_nu]), 0)[outcome]
    return total * 2 / len(ranks)


def rao_kupper(utilities: Tensor, ranks: Sequence[int], alpha: Tensor) -> Tensor:
    """The definition: loss of one ranking, a scalar."""
    total = utilities.new_zeros(())
    for i, j in itertools.combinations(range(len(ranks)), 2):
        above = torch.sigmoid(utilities[i] - utilities[j] - alpha)
        below = torch.sigmoid(utilities[j] - utilities[i] - alpha)
        outcomes = (1 - above - below, above, below)
        total = total - torch.log(outcomes[0 if ranks[i] == ranks[j] else 1 if ranks[i] < ranks[j] else 2])
    return total * 2 / len(ranks)


def davidson_nll(utilities: Tensor, rankings: Rankings, log_nu: Tensor) -> Tensor:
    """[..., R]: `davidson` of every ranking.

    Args:
        utilities: [..., R, K].
        log_nu: scalar.
    """
    half = differences(utilities) / 2
    normaliser = torch.logaddexp(torch.logaddexp(half, -half), log_nu)
    return _shared(normaliser - half, normaliser - log_nu, rankings)


def rao_kupper_nll(utilities: Tensor, rankings: Rankings, alpha: Tensor) -> Tensor:
    """[..., R]: `rao_kupper` of every ranking.

    Args:
        utilities: [..., R, K].
        alpha: scalar, > 0.
    """
    difference = differences(utilities)
    above, below = logsigmoid(difference - alpha), logsigmoid(-difference - alpha)
    return _shared(-above, -(torch.log(torch.expm1(2 * alpha)) + above + below), rankings)


def _shared(ordered: Tensor, tied: Tensor, rankings: Rankings) -> Tensor:
    losses = torch.where(above_mask(rankings), ordered, 0.0) + torch.where(tied_mask(rankings), tied, 0.0)
    return losses.sum((-2, -1)) * 2 / rankings.mask.sum(1)
