"""Plackett-Luce over rankings with ties: the definition, and the same computed at once.

A ranking is a sequence of choices: the best of all K, then the best of those left. P(i first of S) = w_i / Σ_S w with
w = exp(utility). The last choice is none, so a ranking of K counts as K - 1 choices, whatever K is.

Ties have Efron's form. An annotator who ties m completions has not said in which order they would come; Efron's
denominators let each of the m choices find the others of the block gone by equal shares:

    -log L = - Σ_blocks [ Σ_{i in block} u_i - Σ_{l=0}^{m-1} log(Σ_{left, block included} w - l/m Σ_{block} w) ]

- The exact form, the mean of the likelihood over the m! orders, costs m! or 2^m terms, and says nothing of the tied:
  two completions that are all there is have likelihood 1/2 whatever their utilities. An annotator who ties means that
  they are alike. Efron's form has the exact one's value where the tied utilities are equal, and pulls them together.
- Breslow's form (no shares taken off) falls short of that value, the further the larger the block.
- Of two tied completions it is -log σ(Δ) - log σ(-Δ) - log 2: Rao and Kupper's tie as their threshold goes to 0.

Sources: Plackett 1975, "The analysis of permutations"; Luce 1959; Efron 1977, "The efficiency of Cox's likelihood
function for censored data" (Cox' partial likelihood and this one are the same function).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.preference.rankings import Rankings


def plackett_luce(utilities: Tensor, ranks: Sequence[int]) -> Tensor:
    """The definition: loss of one ranking, a scalar.

    Args:
        utilities: [K].
        ranks: [K], 1 = best, equal = tie.
    """
    weights, total = utilities.exp(), utilities.new_zeros(())
    for rank in sorted(set(ranks)):
        block = [i for i, own in enumerate(ranks) if own == rank]
        left = torch.stack([weights[i] for i, own in enumerate(ranks) if own >= rank]).sum()
        tied = torch.stack([weights[i] for i in block]).sum()
        for gone, i in enumerate(block):
            total = total - utilities[i] + torch.log(left - gone / len(block) * tied)
    return total


def plackett_luce_nll(utilities: Tensor, rankings: Rankings) -> Tensor:
    """[..., R]: `plackett_luce` of every ranking.

    Args:
        utilities: [..., R, K].
    """
    ranks, mask = rankings.ranks, rankings.mask
    both_mask = mask[:, :, None] & mask[:, None, :]
    tied_mask = both_mask & (ranks[:, :, None] == ranks[:, None, :])
    left_mask = both_mask & (ranks[:, None, :] >= ranks[:, :, None])
    left, tied = _logsumexp(utilities, left_mask), _logsumexp(utilities, tied_mask)
    gone = tied_mask.tril(-1).sum(-1) / tied_mask.sum(-1).clamp_min(1)
    # Relative to what is left, so that nothing overflows; the share is at most (m - 1) / m, the logarithm finite.
    denominators = left + torch.log1p(-gone * torch.exp(torch.where(mask, tied - left, 0.0)))
    return torch.where(mask, denominators - utilities, 0.0).sum(-1)


def _logsumexp(utilities: Tensor, over_mask: Tensor) -> Tensor:
    """[..., R, K]: over the last axis of [R, K, K]; 0 where the mask has nothing."""
    some = over_mask.any(-1, keepdim=True)
    spread = utilities.unsqueeze(-2).expand(*utilities.shape[:-1], *over_mask.shape[-2:])
    # A row without entries would have the gradient NaN.
    chosen = torch.where(over_mask | ~some, spread, -torch.inf)
    return torch.where(some.squeeze(-1), torch.logsumexp(chosen, -1), 0.0)
