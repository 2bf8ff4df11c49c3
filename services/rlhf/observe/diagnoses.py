"""What the trainer's monitor found, from metrics.jsonl, for `rlhf status` and the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Found:
    """One diagnosis over all steps."""

    name: str
    severity: str
    steps: int
    """In how many it was found."""
    first: int
    last: int
    what: str
    """In the last of them."""
    remedy: str
    holds: bool
    """It was found in the newest step too."""

    @property
    def when(self) -> str:
        """`step 7`, `steps 7 to 9`, or `4 steps from 7 to 12`."""
        if self.steps == 1:
            return f"step {self.last}"
        if self.steps == self.last - self.first + 1:
            return f"steps {self.first} to {self.last}"
        return f"{self.steps} steps from {self.first} to {self.last}"

    def __str__(self) -> str:
        past = "" if self.holds else ", holds again"
        return f"{self.severity}: {self.name} ({self.when}{past}): {self.what}. {self.remedy}"


def summary(rows: Iterable[Mapping[str, Any]]) -> list[Found]:
    """Of the rows of metrics.jsonl, those of the newest step first, then by their last step."""
    found: dict[str, Found] = {}
    newest = 0
    for row in rows:
        newest = int(row["step"])
        for one in row.get("diagnoses", ()):
            before = found.get(one["name"])
            steps, first = (1, newest) if before is None else (before.steps + 1, before.first)
            found[one["name"]] = Found(steps=steps, first=first, last=newest, holds=True, **one)
    now = [one if one.last == newest else _past(one) for one in found.values()]
    return sorted(now, key=lambda one: (-one.last, one.name))


def metrics_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows; the trainer may be writing the next one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def _past(found: Found) -> Found:
    return Found(**{**vars(found), "holds": False})
