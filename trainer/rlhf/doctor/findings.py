"""What the doctor states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.errors import RlhfError


@dataclass(frozen=True)
class Finding:
    """Prints as `ok       redis      …` or `problem  redis      …; remedy`."""

    name: str
    ok: bool
    what: str
    remedy: str = ""
    """What to do, shown where it is not ok."""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy and not self.ok else ""
        return f"{'ok' if self.ok else 'problem':<8} {self.name:<10} {self.what}{remedy}"


def telling(name: str, check: Iterator[Finding]) -> Iterator[Finding]:
    """An error of ours is a finding too: it says what happened and what to do."""
    try:
        yield from check
    except RlhfError as error:
        yield Finding(name, False, str(error))
