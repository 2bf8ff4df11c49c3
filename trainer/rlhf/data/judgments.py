"""Judgments: one annotator's ranking of one prompt's completions a row. Written by `rlhf rank` and by people.

Raw judgments are what is stored; pairs and consensus are derived from them. Rows of the usual preference data sets
(`prompt`, `chosen`, `rejected`) are read as rankings of two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.data.rows import Row, read_rows, write_rows


@dataclass(frozen=True)
class Judgment:
    judgment_id: str
    prompt_index: int
    """Equal for judgments of the same prompt, which stay on one side of a split."""
    prompt: str
    metadata: dict[str, str]
    completions: tuple[str, ...]
    """[K], K ≥ 2."""
    ranks: tuple[int, ...]
    """[K], 1 = best; equal ranks are a tie."""
    annotator: str
    """Pseudonym."""
    order_shown: tuple[int, ...]
    """[K], indices into `completions` in the order in which the annotator saw them."""
    policy_version: str
    """Whose completions these are; "unknown:<source>" where the data does not say."""


def write_judgments(path: Path, judgments: Iterable[Judgment]) -> int:
    """Writes JSON Lines and returns the number of rows; raises StorageError as `write_rows` does."""
    return write_rows(path, map(asdict, judgments))


def read_judgments(source: str | Path) -> list[Judgment]:
    """What `write_judgments` wrote, or rows of `prompt`, `chosen` and `rejected` strings.

    Raises:
        DataError: a row is neither; names file and line.
    """
    index_of_prompt: dict[str, int] = {}
    judgments = []
    for row in read_rows(source):
        is_pair = "chosen" in row.fields and "ranks" not in row.fields
        judgments.append(_from_pair(row, index_of_prompt) if is_pair else _from_row(row))
    return judgments


def _from_row(row: Row) -> Judgment:
    judgment = Judgment(
        judgment_id=row.text("judgment_id"),
        prompt_index=row.require("prompt_index", int, "a whole number"),
        prompt=row.text("prompt"),
        metadata=_metadata(row),
        completions=_listed(row, "completions", str),
        ranks=_listed(row, "ranks", int),
        annotator=row.text("annotator"),
        order_shown=_listed(row, "order_shown", int),
        policy_version=row.text("policy_version"),
    )
    _check(row, judgment)
    return judgment


def _check(row: Row, judgment: Judgment) -> None:
    count = len(judgment.completions)
    if count < 2:
        raise row.error(f"a ranking needs at least two completions, {count} given")
    if len(judgment.ranks) != count or min(judgment.ranks) != 1:
        raise row.error(f'field "ranks" must hold {count} whole numbers from 1 (best) on, not {list(judgment.ranks)}')
    if sorted(judgment.order_shown) != list(range(count)):
        raise row.error(
            f'field "order_shown" must hold each of 0 to {count - 1} once, not {list(judgment.order_shown)}'
        )


def _from_pair(row: Row, index_of_prompt: dict[str, int]) -> Judgment:
    prompt = row.text("prompt")
    return Judgment(
        judgment_id=f"{row.path}:{row.line}",
        prompt_index=index_of_prompt.setdefault(prompt, len(index_of_prompt)),
        prompt=prompt,
        metadata={},
        completions=(row.text("chosen"), row.text("rejected")),
        ranks=(1, 2),
        annotator="unknown",
        order_shown=(0, 1),
        policy_version=f"unknown:{Path(row.path).name}",
    )


def _listed(row: Row, name: str, kind: type) -> tuple[Any, ...]:
    values = row.require(name, list, f"a list of {'strings' if kind is str else 'whole numbers'}")
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise row.error(f'field "{name}" must hold only {"strings" if kind is str else "whole numbers"}')
    return tuple(row.encodable(name, value) for value in values) if kind is str else tuple(values)


def _metadata(row: Row) -> dict[str, str]:
    metadata: dict[str, str] = row.require("metadata", dict, "an object of strings")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise row.error('field "metadata" must hold only strings')
    return metadata
