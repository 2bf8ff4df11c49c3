"""What is trained: a language model's trunk under the members' heads, with the annotators who judged by them.

Members that share a trunk differ by their heads' first weights and by the prompts that each has drawn. Annotators and
the directions of their tastes are common to all members.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rlhf.models.reward import RewardModel
from rlhf.preference.comparisons import ComparisonBatch
from rlhf.preference.crowd import Annotators
from rlhf.preference.loss import RankingLoss
from rlhf.preference.settings import RewardModelSettings


class PreferenceModel(nn.Module):
    def __init__(self, reward: RewardModel, section: RewardModelSettings, annotators: int, members: int) -> None:
        """
        Args:
            reward: its trunk is trained in place, but for what is frozen, and its head is the first member's first
                weight.
            annotators: A.
            members: heads over this trunk.
        """
        super().__init__()
        self.reward = reward
        self.loss = RankingLoss(section.loss, section.margin)
        self.heads = nn.Parameter(_heads(reward, members, section.seed))
        reward.head.requires_grad_(False)
        self.annotators: Annotators | None = None
        if section.annotators != "none":
            rank = section.embedding_rank if section.annotators == "groups" else 0
            self.annotators = Annotators(
                annotators,
                position_bias=section.position_bias,
                rank=rank,
                ridge=section.embedding_ridge,
                lr=section.lr,
                seed=section.seed,
            )
            if rank:
                self.taste_heads = nn.Parameter(_random(rank, reward, section.seed + 1_000_003))
        self.to(reward.device)

    def forward(self, batch: ComparisonBatch, total_weight: float) -> Tensor:
        """Sum of the losses of a batch, a scalar in float32; a mean over members.

        Args:
            total_weight: of all batches of a pass, over which the annotators' priors are spread.
        """
        hidden = self.reward.last_hidden(batch.input_ids, batch.attention_mask)
        with torch.autocast(hidden.device.type, enabled=False):
            nll = self._nll(hidden.float(), batch)
            loss = (nll * batch.draws).sum() / len(self.heads)
            if self.annotators is not None:
                loss = loss + self.annotators.penalty() * (batch.weight / total_weight)
            return loss

    def _nll(self, hidden: Tensor, batch: ComparisonBatch) -> Tensor:
        """[N, H] -> [M, R]."""
        utilities = batch.rankings.utilities((hidden @ self.heads.T).T)
        if self.annotators is None:
            return self.loss(utilities, batch.rankings)  # type: ignore[no-any-return]
        tastes = (hidden @ self.taste_heads.T)[batch.rankings.items] if self.annotators.rank else None
        return self.annotators(self.loss, utilities, tastes, batch.rankings)  # type: ignore[no-any-return]

    @torch.no_grad()
    def group_heads(self, centres: Tensor | None) -> Tensor:
        """[M, G, H]: r_0 with the taste of each group; one group where there are no tastes.

        Args:
            centres: [G, rank]
        """
        if centres is None:
            return self.heads.detach()[:, None]
        return (self.heads[:, None] + (centres.to(self.heads) @ self.taste_heads)[None]).detach()


def _heads(reward: RewardModel, members: int, seed: int) -> Tensor:
    """[M, H] as `RewardModel.new` draws them."""
    others = [_random(1, reward, seed + member) for member in range(1, members)]
    return torch.cat([reward.head.weight.detach().float(), *others])


def _random(rows: int, reward: RewardModel, seed: int) -> Tensor:
    width = reward.head.in_features
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)
    return drawn.to(reward.device)
