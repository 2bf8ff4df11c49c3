"""Vocabulary-parallel: each process holds an equal share of the labels, in the order of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from rlhf.ops import rows


def group_name(group: dist.ProcessGroup | None) -> str:
    """What stands for a group in the arguments of a custom operator; empty: none."""
    return "" if group is None else group.group_name


def resolve(name: str) -> dist.ProcessGroup | None:
    """The group of that name."""
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(0, 1) without a group."""
    return (0, 1) if group is None else (group.rank(), group.size())


def merge(partials: Tensor, of: rows.Distribution, has_ref: bool, group: dist.ProcessGroup | None) -> rows.RowOutputs:
    """`rows.merge` over the slices of all processes: one MAX and one SUM, of 8 floats a row together."""
    if group is None:
        return rows.merge(partials, of, has_ref)
    own = rows.combine(partials, of.temperature)
    maxima = own[:, [0, 4]].contiguous()
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    own = rows.combine(own.unsqueeze(1), of.temperature, maxima)
    sums = own[:, [1, 2, 3, 5, 6, 7]].contiguous()
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    whole = torch.cat([maxima[:, :1], sums[:, :3], maxima[:, 1:], sums[:, 3:]], dim=-1)
    return rows.merge(whole.unsqueeze(1), of, has_ref)


def sum_(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensor, summed over the processes in place."""
    if group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor
