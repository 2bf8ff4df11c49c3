"""Annotators, fitted together with the rewards they judge by: how reliable each is, what place on the screen does to
it, and how its taste differs from the others'.

Reliability. A ranking comes from one of three kinds of judging, and each annotator k has its shares π_k of them:

    P_k(ranking) = π_honest P(ranking | r) + π_adversarial P(upside-down ranking | r) + π_random P(ranking | 0)

with P of whichever ranking loss, exp(-loss). For a single pair that is Crowd-BT, whose η_k is honest + random / 2: a
random clicker is a half of each side. For rankings the mixture is per ranking, not per pair: an annotator who does not
read turns no pairs over one by one, and a mixture of a ranking and its reverse is not random. Shares have a
Dirichlet(4, 3/2, 3/2) prior, which Crowd-BT's Beta(4, 3/2) becomes with one more kind. Measured on three seeds, the
mixture and Crowd-BT on all pairs are as accurate; scaling each annotator's utilities (P(ranking | s_k r)) is not.

Place. An annotator adds (b + b_k) * place to what it sees, place from -1/2 (first shown) to 1/2 (last).

Taste. r_k = r_0 + u_k · g(x, y), u_k of rank 2 to 8 with a ridge: people who honestly differ are no bad annotators.
There the kinds are honest and random alone. A taste can be turned upside down like any other, so with the adversarial
kind beside it each dissenter has two explanations that mirror each other, and fits end in the wrong one (minority
accuracy 0.4 to 0.5 in place of 0.9, three seeds). An adversary then is a taste like others, which gold items give away
(`reliability`).

Sources: Chen et al. 2013, "Pairwise ranking aggregation in a crowdsourced setting" (Crowd-BT); Bugakova et al. 2019,
arXiv:1906.03711 (factorBT); low-rank tastes as in Poddar et al. 2024, arXiv:2408.10075, here without an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.preference.loss import RankingLoss
from rlhf.preference.rankings import Rankings

KINDS = ("honest", "adversarial", "random")
PRIOR = {"honest": 4.0, "adversarial": 1.5, "random": 1.5}
"""Of the Dirichlet distribution of an annotator's shares."""
_LOGIT_STEP, _TASTE_STEP = 0.05, 0.01
"""By how much one step of Adam at the peak learning rate moves a logit of a share, and a number of a taste. Adam moves
a parameter by its learning rate, which is made for a network's weights: these must travel units in as many steps as
those travel hundredths, whatever the learning rate is. So they are learnt on a smaller scale."""


class Annotators(nn.Module):
    """Parts that are not asked for have no parameters."""

    def __init__(
        self,
        count: int,
        *,
        reliability: bool = True,
        position_bias: bool = False,
        rank: int = 0,
        ridge: float = 0.3,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        """
        Args:
            count: A.
            rank: of tastes; 0: all have the same.
            ridge: times |u_k|², nats.
            lr: peak learning rate that they are trained with.
        """
        super().__init__()
        self.ridge, self.rank = ridge, rank
        self._logit_scale, self._taste_scale = _LOGIT_STEP / lr, _TASTE_STEP / lr
        self.kinds = tuple(kind for kind in KINDS if kind != "adversarial" or not rank)
        if reliability:
            self.logits = nn.Parameter(torch.zeros(count, len(self.kinds)))
        if position_bias:
            self.place = nn.Parameter(torch.zeros(count + 1))
        if rank:
            generator = torch.Generator().manual_seed(seed)
            drawn = 0.3 * torch.randn(count, rank, generator=generator)
            self.scaled_tastes = nn.Parameter(drawn / self._taste_scale)
        self.prior: Tensor
        self.register_buffer("prior", torch.tensor([PRIOR[kind] for kind in self.kinds]), persistent=False)

    @property
    def log_shares(self) -> Tensor:
        """[A, kinds]"""
        prior = self.prior / self.prior.sum()
        return torch.log_softmax(prior.log() + self._logit_scale * self.logits, -1)

    @property
    def tastes(self) -> Tensor:
        """[A, rank], u."""
        return self._taste_scale * self.scaled_tastes

    @property
    def place_bias(self) -> Tensor:
        """[A]: what an annotator adds from the first place to the last."""
        return self._logit_scale * (self.place[0] + self.place[1:])

    def utilities(self, utilities: Tensor, tastes: Tensor | None, rankings: Rankings) -> Tensor:
        """[..., R, K]: as each ranking's annotator sees them.

        Args:
            utilities: [..., R, K], r_0.
            tastes: [R, K, rank], g; None: all have the same taste.
        """
        if tastes is not None:
            utilities = utilities + (tastes * self.tastes[rankings.annotators][:, None]).sum(-1)
        if hasattr(self, "place"):
            utilities = utilities + self.place_bias[rankings.annotators][:, None] * rankings.places
        return torch.where(rankings.mask, utilities, 0.0)

    def forward(self, loss: RankingLoss, utilities: Tensor, tastes: Tensor | None, rankings: Rankings) -> Tensor:
        """[..., R]: -log likelihood of every ranking. See `utilities`."""
        seen = self.utilities(utilities, tastes, rankings)
        if not hasattr(self, "logits"):
            return loss(seen, rankings)  # type: ignore[no-any-return]
        return mixture_nll(kind_nlls(self.kinds, loss, seen, rankings), self.log_shares[rankings.annotators])

    def penalty(self) -> Tensor:
        """Minus the logarithm of the priors, of all annotators: added once a pass over the judgments."""
        total = torch.zeros((), device=self.prior.device)
        if hasattr(self, "logits"):
            total = total - ((self.prior - 1) * self.log_shares).sum()
        if hasattr(self, "place"):
            total = total + 0.5 * (self._logit_scale * self.place).square().sum()
        if self.rank:
            total = total + self.ridge * self.tastes.square().sum()
        return total


def crowd(nlls: Sequence[Tensor], shares: Sequence[Tensor]) -> Tensor:
    """The definition: loss of one ranking by one annotator, a scalar.

    Args:
        nlls: by kind, scalars.
        shares: by kind, scalars that add up to 1.
    """
    likelihoods = [share * torch.exp(-nll) for share, nll in zip(shares, nlls, strict=True)]
    return -torch.log(torch.stack(likelihoods).sum())


def kind_nlls(kinds: Sequence[str], loss: RankingLoss, utilities: Tensor, rankings: Rankings) -> Tensor:
    """[..., R, kinds]: losses of every ranking as if it were of each kind."""
    of_kind = {
        "honest": lambda: loss(utilities, rankings),
        "adversarial": lambda: loss(utilities, rankings.reversed()),
        "random": lambda: loss(torch.zeros_like(utilities), rankings),
    }
    return torch.stack([of_kind[kind]() for kind in kinds], -1)


def mixture_nll(nlls: Tensor, log_shares: Tensor) -> Tensor:
    """[..., R]: `crowd` of every ranking.

    Args:
        nlls: [..., R, kinds].
        log_shares: [R, kinds].
    """
    return -torch.logsumexp(log_shares - nlls, -1)
