"""What a replay shows: figures beside each other, and what is the very same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names of figures that are not the very same. One that was not recorded cannot differ."""
    return [name for name, value in found.items() if name in recorded and not _same(recorded[name], value)]


def compared(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Two changes of the same weights: the other's length as a share of the one's, and the cosine between them."""
    a, b = (torch.cat([tensor.double().flatten() for tensor in change.values()]) for change in (one, other))
    lengths = a.norm(), b.norm()
    return {
        "change_length": float(lengths[1] / lengths[0]),
        "change_cosine": float(a @ b / (lengths[0] * lengths[1])),
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return bool(one == other)


def show(columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Figures beside each other; `=` where a number is the very same as in the first column."""
    first = columns["recorded"]
    names = [name for name, value in columns["computed again"].items() if value is not None or name in first]
    rows = [["", *columns]]
    for name in names:
        rows.append([name, *(_cell(column, name, first, i) for i, column in enumerate(columns.values()))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(column: Mapping[str, Any], name: str, first: Mapping[str, Any], place: int) -> str:
    if name not in column:
        return "not recorded"
    value = column[name]
    if place and name in first and _same(first[name], value):
        return "="
    if isinstance(value, str):
        return value[:12]
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    short = f"{value:.6g}"
    hidden = place and isinstance(first.get(name), float) and f"{first[name]:.6g}" == short
    return repr(value) if hidden else short


def ranges(steps: Sequence[int]) -> str:
    """`3, 7 to 12`."""
    parts: list[list[int]] = []
    for step in sorted(steps):
        if parts and parts[-1][-1] == step - 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join(" to ".join(map(str, part)) for part in parts)
