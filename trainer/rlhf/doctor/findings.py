"""One statement of the doctor."""

from __future__ import annotations

from dataclasses import dataclass


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
