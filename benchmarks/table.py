"""The figures of benchmarks/results as Markdown tables, between the markers in README.md and benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.bench import RESULTS
from harness.machine import ROOT

NAMES = ("generation", "scaling", "transport", "weights", "queues", "memory", "linear", "determinism")
"""In the order of the tables, and of `make bench`."""
GPU_NAMES = ("kernels-gpu",)
"""Of `make bench-gpu`."""
TRL_NAMES = ("trl",)
"""Of `make bench-trl`."""
LONG_NAMES = ("estimators",)
"""Of `make bench-estimators`."""
FEEDBACK_NAMES = ("feedback-annotators", "feedback-selection", "feedback-sentences", "feedback-loop")
"""Of `make bench-feedback`."""
MARKED = re.compile(r"(<!-- bench: begin -->\n).*?(<!-- bench: end -->)", re.DOTALL)

Result = dict[str, Any]


def load(folder: Path) -> list[Result]:
    paths = [folder / f"{name}.json" for name in (*NAMES, *FEEDBACK_NAMES, *LONG_NAMES, *TRL_NAMES, *GPU_NAMES)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def headlines(results: Sequence[Result]) -> str:
    """One table of the figures that the project's README shows."""
    lines = [
        *_measured_on(results, versions=("torch",)),
        "",
        "| | | median | least to most | wanted |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for result in results:
        names = [result["benchmark"], *[""] * len(result["figures"])]
        shown = [figure for figure in result["figures"] if figure["headline"]]
        lines += [f"| {name} {_row(figure)}" for name, figure in zip(names, shown, strict=False)]
    return "\n".join(lines) + "\n"


def everything(results: Sequence[Result]) -> str:
    """A table for every benchmark."""
    lines = _measured_on(results)
    for result in results:
        setup = ", ".join(f"{name} {value}" for name, value in result["setup"].items())
        threads = ", ".join(f"{name} {count}" for name, count in result["threads"].items())
        lines += ["", f"### {result['benchmark']}", "", result["question"], ""]
        lines += ["| | median | least to most | wanted |", "| --- | ---: | ---: | --- |"]
        lines += [_row(figure) for figure in result["figures"]]
        lines += ["", f"Set-up: {setup}. Threads: {threads}. Took {result['seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def write_into(path: Path, table: str) -> None:
    """
    Raises:
        ValueError: the file has no markers.
    """
    text = path.read_text()
    if not MARKED.search(text):
        raise ValueError(f"{path}: has no <!-- bench: begin --> and <!-- bench: end --> to write between")
    path.write_text(MARKED.sub(lambda found: f"{found[1]}{table}{found[2]}", text))


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _row(figure: dict[str, Any]) -> str:
    median = f"{number(figure['median'])} {figure['unit']}"
    return f"| {figure['name']} | {median} | {_spread(figure)} | {_wanted(figure)} |"


def _spread(figure: dict[str, Any]) -> str:
    if len(figure["values"]) == 1:
        return ""
    return f"{number(figure['min'])} to {number(figure['max'])}"


def _wanted(figure: dict[str, Any]) -> str:
    if figure["at_least"] is None and figure["at_most"] is None:
        return ""
    least, most = figure["at_least"], figure["at_most"]
    met = (least is None or figure["median"] >= least) and (most is None or figure["median"] <= most)
    bound = f"at least {least:g}" if least is not None else f"at most {most:g}"
    return bound if met else f"{bound}: **missed**"


def _measured_on(results: Sequence[Result], versions: Sequence[str] | None = None) -> list[str]:
    """One line for each machine, versions and commit among the results.

    Args:
        versions: those that are named; None: all, and the commit.
    """
    places: dict[str, list[str]] = {}
    for result in results:
        machine = result["machine"]
        commit = f", commit {machine['commit']}" if versions is None else ""
        named = machine["versions"].items()
        listed = ", ".join(f"{name} {version}" for name, version in named if versions is None or name in versions)
        quick = ", **quick sizes: no measurement**" if result["quick"] else ""
        place = (
            f"{_gpu(machine)}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, "
            f"{machine['os']}; "
            f"Python {machine['python']}, {listed}; {machine['date'][:10]}{commit}{quick}."
        )
        places.setdefault(place, []).append(result["benchmark"])
    if len(places) == 1:
        return [next(iter(places))]
    return [f"- {', '.join(names)}: {place}" for place, names in places.items()]


def _gpu(machine: dict[str, Any]) -> str:
    gpu = machine.get("gpu")
    return f"{gpu['name']}, {gpu['memory_gib']:.0f} GiB, driver {gpu['driver']}; " if gpu else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file for the headlines")
    parser.add_argument("--details", type=Path, default=ROOT / "benchmarks" / "README.md", help="file for everything")
    given = parser.parse_args()
    results = load(given.results)
    write_into(given.readme, headlines(results))
    write_into(given.details, everything(results))


if __name__ == "__main__":
    main()
