"""The command: which shapes and cases, and what becomes of the results."""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu import peers
from gpu.cases import CASES, Case
from gpu.ceilings import Ceilings
from gpu.measure import OURS, measure
from gpu.shapes import SHAPES, TINY, Shape, linear_sets, logits_sets
from gpu.timing import Stopwatch, clocks
from harness.bench import RESULTS, Figure, say
from harness.machine import ROOT, described
from table import everything, headlines, load, write_into

NAME = "kernels-gpu"
QUESTION = "How near do the kernels come to what the GPU can do, and what do others need?"


def main() -> int:
    given = _parsed()
    if not given.tiny and not torch.cuda.is_available():
        say("there is no GPU to measure on; --tiny tries the benchmark without one")
        return 2
    if given.tiny and given.out is None:
        say("tiny: no figure means anything, and nothing is written without --out")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shapes = TINY if given.tiny else given.shapes or SHAPES
    chosen = [case for case in CASES if not given.cases or any(part in case.name for part in given.cases)]
    out = given.out or (None if given.tiny else RESULTS)
    results, began_s = _Results(out, device, tiny=given.tiny), time.monotonic()
    for shape in shapes:
        for of_logits in (True, False):
            stopwatch = Stopwatch(device, 3 if given.tiny else given.rounds, given.seconds)
            cases = [case for case in chosen if case.of_logits == of_logits]
            if began_s + given.minutes * 60 < time.monotonic():
                results.left_out([f"{case.name}, {shape}" for case in cases])
                continue
            _level(cases, shape, stopwatch, results, given.without)
    if out == RESULTS:
        _write_tables()
    missing = [entry for entry in results.cases if "absent" in entry["providers"][OURS]]
    for entry in missing:
        say(f"{entry['case']}, {entry['shape']}: ours is absent: {entry['providers'][OURS]['absent']}")
    return 1 if missing or not results.cases else 0


def _level(cases: list[Case], shape: Shape, stopwatch: Stopwatch, results: _Results, without: Sequence[str]) -> None:
    """The cases that share their inputs."""
    if not cases:
        return
    tiny = stopwatch.device.type != "cuda" or shape in TINY
    sets: list[Any] = []
    try:
        sets += (logits_sets if cases[0].of_logits else linear_sets)(shape, stopwatch.device)
    except torch.cuda.OutOfMemoryError:
        results.left_out([f"{case.name}, {shape}: the GPU's memory does not hold the inputs" for case in cases])
        cases = []
    for case in cases:
        # Made anew: a case's matrices are in the way of the next one's memory.
        ceilings = Ceilings(shape, stopwatch.device, tiny=tiny)
        try:
            results.add(measure(case, shape, sets, ceilings, stopwatch, without))
        except torch.cuda.OutOfMemoryError:
            results.left_out([f"{case.name}, {shape}: the GPU's memory does not hold what it is compared with"])
        del ceilings
        _empty(stopwatch.device)
    del sets
    _empty(stopwatch.device)


class _Results:
    """Written after every case: what a run that is cut short has measured is not lost."""

    def __init__(self, out: Path | None, device: torch.device, *, tiny: bool) -> None:
        self._out, self._tiny, self._began_s = out, tiny, time.monotonic()
        self.cases: list[dict[str, Any]] = []
        self._not_measured: list[str] = []
        self._machine = described(("torch", "triton")) | {"gpu": _gpu(device)}
        self._machine["versions"] |= {"cuda": torch.version.cuda or "none"} | peers.versions()

    def add(self, entry: dict[str, Any]) -> None:
        self.cases.append(entry)
        for line in _lines(entry):
            say(line)
        self._write()

    def left_out(self, what: list[str]) -> None:
        self._not_measured += what
        self._write()

    def _write(self) -> None:
        if self._out is None or not self.cases:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        result = {
            "benchmark": NAME,
            "question": QUESTION,
            "quick": self._tiny,
            "machine": self._machine,
            "threads": {"torch": torch.get_num_threads()},
            "setup": {"dtype": "bfloat16", "samples": "in turn, from a cold L2 cache"},
            "checks": {"not_measured": self._not_measured},
            "seconds": round(time.monotonic() - self._began_s, 1),
            "figures": [figure.as_json() for entry in self.cases for figure in _figures(entry, tiny=self._tiny)],
            "cases": self.cases,
        }
        (self._out / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")


def _figures(entry: dict[str, Any], *, tiny: bool) -> list[Figure]:
    """Rows of the table; of the shapes without bars, this project's share alone."""
    judged = entry["judged"]
    title = f"{entry['case']}, {' x '.join(str(entry['shape'][size]) for size in ('tokens', 'hidden', 'vocabulary'))}"
    figures = []
    for bar in entry["bars"]:
        if bar["value"] is not None:
            least, most = (bar["at_least"], bar["at_most"]) if judged else (None, None)
            first = judged and entry["shape"]["vocabulary"] == SHAPES[0].vocab
            figures.append(Figure(f"{title}: {bar['name']}", "", [bar["value"]], least, most, headline=first))
    for name, found in entry["providers"].items():
        if "absent" not in found and (judged or tiny):
            figures.append(Figure(f"{title}: {name}", "ms", found["samples_ms"]))
    return figures


def _lines(entry: dict[str, Any]) -> list[str]:
    lines = [f"\n{entry['case']}, {entry['shape']}"]
    for name, found in entry["providers"].items():
        if "absent" in found:
            lines.append(f"  {name}: absent, {found['absent']}")
            continue
        peak = "" if found["peak_bytes"] is None else f", {found['peak_bytes'] / 1e9:.2f} GB"
        wrong = ", ".join(f"{output} {error:.1e}" for output, error in found["largest_errors"].items())
        lines.append(f"  {name}: {found['median_ms']:.3f} ms{peak}; errors: {wrong or 'not compared'}")
    for bar in entry["bars"]:
        verdict = "" if not entry["judged"] else (", met" if bar["met"] else ", MISSED")
        lines.append(f"  {bar['name']}: {'unknown' if bar['value'] is None else format(bar['value'], '.3f')}{verdict}")
    return lines


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gib": found.total_memory / 2**30,
        "driver": clocks(device, "driver_version").get("driver_version", "unknown"),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
    }


def _write_tables() -> None:
    results = load(RESULTS)
    write_into(ROOT / "README.md", headlines(results))
    write_into(ROOT / "benchmarks" / "README.md", everything(results))


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--tiny", action="store_true", help="sizes at which nothing is measured, on a CPU too")
    parser.add_argument("--out", type=Path, help="folder of the JSON; benchmarks/results, and none with --tiny")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", help="tokens x hidden x vocabulary: 8192x4096x128256")
    parser.add_argument("--cases", nargs="+", help="parts of their names")
    parser.add_argument("--without", nargs="+", default=[], help="parts of the names of providers to leave out")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one case, after which five samples are enough")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no more shapes are begun")
    given = parser.parse_args()
    # The results' folder is the caller's, whatever folder the script is in.
    given.out = None if given.out is None else Path(os.path.abspath(given.out))
    return given
