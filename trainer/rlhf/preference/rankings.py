"""Rankings side by side as rectangles of tensors: the form in which every loss and every model of annotators reads
them.

Shapes: `M` members of an ensemble, `N` completions, each scored once, `R` rankings, `K` completions of the longest
ranking, `A` annotators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """One annotator's ranking, of completions that are numbered."""

    items: Sequence[int]
    """[K], numbers of the completions."""
    ranks: Sequence[int]
    """[K], 1 = best, equal = tie."""
    annotator: int = 0
    order_shown: Sequence[int] = ()
    """[K], indices into `items` in the order in which they were seen; empty: unknown."""
    strength: int | None = None
    """1 (slightly) to 3 (much) better, of two completions; None: not asked."""
    prompt: int = 0
    """Number of the prompt, by which members of an ensemble draw."""


@dataclass(frozen=True)
class Rankings:
    """Where a ranking is shorter than K, `mask` is False and the other entries mean nothing."""

    items: Tensor
    """[R, K] int64, into the N completions."""
    ranks: Tensor
    """[R, K] int64, 1 = best."""
    mask: Tensor
    """[R, K] bool, True = a completion of the ranking."""
    annotators: Tensor
    """[R] int64"""
    places: Tensor
    """[R, K] float32: where each was shown, from -1/2 (first) to 1/2 (last); 0 where that is unknown."""
    strengths: Tensor
    """[R] float32, 1 to 3; 0 where it was not asked."""
    prompts: Tensor
    """[R] int64"""

    def __len__(self) -> int:
        return len(self.items)

    def to(self, device: torch.device) -> Rankings:
        return Rankings(**{each.name: getattr(self, each.name).to(device) for each in fields(self)})

    def rows(self, chosen: Tensor) -> Rankings:
        """Some of the rankings: [r] int64 or [R] bool."""
        return Rankings(**{each.name: getattr(self, each.name)[chosen] for each in fields(self)})

    def reversed(self) -> Rankings:
        """The same with the worst on top."""
        top = torch.where(self.mask, self.ranks, 0).amax(1, keepdim=True)
        return Rankings(
            **{each.name: getattr(self, each.name) for each in fields(self)} | {"ranks": top + 1 - self.ranks}
        )

    @property
    def orders(self) -> Tensor:
        """[R] float32: K - 1, as much as a ranking of K can order, whatever is tied."""
        return self.mask.sum(1).float() - 1

    def utilities(self, scores: Tensor) -> Tensor:
        """[..., N] scores -> [..., R, K] float32; 0 outside the mask."""
        return torch.where(self.mask, scores.float()[..., self.items], 0.0)


def rankings_of(some: Sequence[Ranking]) -> Rankings:
    """
    Args:
        some: at least one, of two completions or more.
    """
    longest = max(len(each.items) for each in some)
    return Rankings(
        items=_rectangle([each.items for each in some], longest),
        ranks=_rectangle([each.ranks for each in some], longest, fill=1),
        mask=_rectangle([[1] * len(each.items) for each in some], longest).bool(),
        annotators=torch.tensor([each.annotator for each in some]),
        places=torch.stack([_places(each, longest) for each in some]),
        strengths=torch.tensor([float(each.strength or 0) for each in some]),
        prompts=torch.tensor([each.prompt for each in some]),
    )


def _rectangle(rows: Sequence[Sequence[int]], width: int, fill: int = 0) -> Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def _places(ranking: Ranking, width: int) -> Tensor:
    places = torch.zeros(width)
    for place, item in enumerate(ranking.order_shown):
        places[item] = place / (len(ranking.items) - 1) - 0.5
    return places
