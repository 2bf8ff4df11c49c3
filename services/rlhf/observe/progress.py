"""How far a stage has come: a bar on a terminal, one plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_EVERY_S = 5.0


class Bar(Protocol):
    def advance(self, amount: float = 1, **figures: float | str) -> None:
        """`amount` more units are done; `figures` (loss=2.31) are shown beside the bar until replaced."""


@contextmanager
def progress(name: str, *, total: float | None, unit: str = "steps", stream: TextIO | None = None) -> Iterator[Bar]:
    """Shows the progress of `name`, in `total` units (None: their number is not known), until the block is left.

    A rich bar where `stream` (stderr) is a terminal, otherwise one line about every 5 s and one at the end.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        with _rich(unit, stream) as bars:
            yield RichBar(bars, bars.add_task(name, total=total, figures=""))
        return
    bar = PlainBar(name, total, unit, stream)
    try:
        yield bar
    finally:
        bar.close()


def figures_text(figures: dict[str, float | str]) -> str:
    """`loss 2.31  kl 0.004`: numbers with three significant digits, whole numbers as they are."""
    return "  ".join(f"{name} {_number(value)}" for name, value in figures.items())


class RichBar:
    """A bar of a rich display."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task
        self._figures: dict[str, float | str] = {}

    def advance(self, amount: float = 1, **figures: float | str) -> None:
        self._figures.update(figures)
        self._bars.update(self._task, advance=amount, figures=figures_text(self._figures))


class PlainBar:
    """Lines such as `pretrain 120/300 steps 12 s  loss 2.31`."""

    def __init__(self, name: str, total: float | None, unit: str, stream: TextIO) -> None:
        self._name, self._total, self._unit, self._stream = name, total, unit, stream
        self._done = 0.0
        self._figures: dict[str, float | str] = {}
        self._started_s = self._written_s = time.monotonic()

    def advance(self, amount: float = 1, **figures: float | str) -> None:
        self._done += amount
        self._figures.update(figures)
        if time.monotonic() - self._written_s >= PLAIN_LINE_EVERY_S:
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._written_s = time.monotonic()
        total = "" if self._total is None else f"/{self._total:g}"
        line = f"{self._name} {self._done:g}{total} {self._unit} {self._written_s - self._started_s:.0f} s"
        print("  ".join(filter(None, (line, figures_text(self._figures)))), file=self._stream, flush=True)


def _rich(unit: str, stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=Console(file=stream),
    )


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) else f"{value:.3g}"
