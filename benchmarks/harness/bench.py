"""What every benchmark is made of: a question, options, interleaved repetition, and figures kept as JSON.

    if __name__ == "__main__":
        main("generation", "How fast …?", measure)

Run as a script, `--quick` takes sizes at which nothing is measured, only tried.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from harness.machine import ROOT, described

T = TypeVar("T")

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Options:
    quick: bool
    out: Path
    """Folder of the JSON."""
    paths: Mapping[str, Path] = field(default_factory=dict)
    """What a script asks for besides."""

    @property
    def runs(self) -> Path:
        """Where runs of the product lie; a later benchmark finds the models that an earlier one made."""
        return (self.out if self.quick else ROOT) / "runs"

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    unit: str
    values: Sequence[float]
    """One per repetition."""
    at_least: float | None = None
    at_most: float | None = None
    """What is wanted, where something is."""
    headline: bool = False
    """Shown in the project's README too."""

    def as_json(self) -> dict[str, Any]:
        values = [float(value) for value in self.values]
        if not values or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{self.name}: numbers expected, {values} measured")
        kept = {"name": self.name, "unit": self.unit, "median": statistics.median(values)}
        kept |= {"min": min(values), "max": max(values), "values": values}
        return kept | {"at_least": self.at_least, "at_most": self.at_most, "headline": self.headline}


@dataclass(frozen=True)
class Measured:
    figures: Sequence[Figure]
    setup: Mapping[str, Any]
    """Sizes and seeds, by which the measurement can be repeated."""
    threads: Mapping[str, int]
    """Of torch, by process."""
    checks: Mapping[str, Any] = field(default_factory=dict)
    """What was compared to see that both sides did the same work."""


def main(
    name: str,
    question: str,
    measure: Callable[[Options], Measured],
    paths: Mapping[str, tuple[str, Path | None]] | None = None,
) -> None:
    """
    Args:
        paths: files or folders that the script needs besides: help, and what is taken unless one is given.
    """
    options = _options(question, paths or {})
    began_s = time.monotonic()
    say(question)
    measured = measure(options)
    result: dict[str, Any] = {
        "benchmark": name,
        "question": question,
        "quick": options.quick,
        "machine": described(),
        "threads": dict(measured.threads),
        "setup": dict(measured.setup),
        "checks": dict(measured.checks),
        "seconds": round(time.monotonic() - began_s, 1),
        "figures": [figure.as_json() for figure in measured.figures],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for figure in measured.figures:
        say(f"  {figure.name}: {statistics.median(figure.values):.4g} {figure.unit}")


def interleaved(ways: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each way returns, A B A B …, so that a machine that grows slower or faster favours none."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for number in range(1, repeats + 1):
        for name, way in ways.items():
            say(f"  {number}/{repeats} {name}")
            found[name].append(way())
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def expect_equal(what: str, **sides: object) -> None:
    """Both sides of a comparison must have done the same work."""
    if len(set(sides.values())) != 1:
        raise ValueError(f"{what} differ, so nothing is compared: {sides}")


def expect_near(what: str, one: float, other: float) -> None:
    """The same for sampled tokens, of which rounding in batches of other sizes may change one in many thousand, and so
    the end of a sequence."""
    if abs(one - other) > 0.02 * max(one, other):
        raise ValueError(f"{what} differ, so nothing is compared: {one} and {other}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder:
        yield Path(folder)


def _options(question: str, paths: Mapping[str, tuple[str, Path | None]]) -> Options:
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="sizes at which nothing is measured, only tried")
    parser.add_argument("--out", type=Path, help="folder of the JSON; benchmarks/results, --quick needs another one")
    for name, (what, usual) in paths.items():
        parser.add_argument(f"--{name}", type=Path, default=usual, required=usual is None, help=what)
    given = parser.parse_args()
    for name in paths:
        if not getattr(given, name).exists():
            parser.error(f"--{name}: there is no {getattr(given, name)}")
    if given.quick and given.out is None:
        parser.error("--quick: its figures mean nothing, so --out must name a folder for them")
    return Options(given.quick, (given.out or RESULTS).absolute(), {name: getattr(given, name) for name in paths})
