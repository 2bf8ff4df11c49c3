"""The losses by name, with whatever they fit besides utilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rlhf.preference.pairwise import all_pairs_nll, margin_nll, scaled_nll
from rlhf.preference.plackett_luce import plackett_luce_nll
from rlhf.preference.rankings import Rankings
from rlhf.preference.settings import LossName
from rlhf.preference.ties import davidson_nll, rao_kupper_nll


class RankingLoss(nn.Module):
    """Loss of rankings under utilities: the smaller, the likelier."""

    def __init__(self, name: LossName = "plackett-luce", margin: float = 1.0) -> None:
        super().__init__()
        self.name = name
        self.margin = margin
        if name in ("davidson", "rao-kupper"):
            # log ν = 0, and α = softplus(0) = log 2: either gives a tie one third where utilities are equal.
            self.tie = nn.Parameter(torch.zeros(()))

    def forward(self, utilities: Tensor, rankings: Rankings) -> Tensor:
        """[..., R, K] -> [..., R], in the utilities' dtype."""
        match self.name:
            case "plackett-luce":
                return plackett_luce_nll(utilities, rankings)
            case "all-pairs":
                return all_pairs_nll(utilities, rankings)
            case "margin":
                return margin_nll(utilities, rankings, self.margin)
            case "scaled":
                return scaled_nll(utilities, rankings)
            case "davidson":
                return davidson_nll(utilities, rankings, self.tie)
            case "rao-kupper":
                return rao_kupper_nll(utilities, rankings, softplus(self.tie))

    def weights(self, rankings: Rankings) -> Tensor:
        """[R]: what each ranking counts, by which a batch's sum is divided."""
        return rankings.orders * rankings.strengths.clamp_min(1.0) if self.name == "scaled" else rankings.orders
