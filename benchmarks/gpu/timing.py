"""Samples of several ways in turn, each from a cold cache, and what a way has allocated at its most.

On a GPU: 256 MB are zeroed before each sample, which empties the L2 cache, and the GPU sleeps for a millisecond before
that, so that launches are queued by the time the clock starts: measured is the GPU's time, not Python's. On a CPU,
where the benchmark is only tried, seconds on the wall.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CACHE_BYTES = 256 * 2**20
SLEEP_CYCLES = 2_000_000
WARM_UPS = 3
QUERIED = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


@dataclass(frozen=True)
class Way:
    """Something to time."""

    name: str
    prepare: Callable[[int], Callable[[], object]]
    """Gets the number of the input set; what it does is not timed, what it returns is."""


@dataclass(frozen=True)
class Samples:
    ms: Sequence[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    def as_json(self) -> dict[str, Any]:
        low, *_, high = statistics.quantiles(self.ms, n=5) if len(self.ms) > 1 else (self.ms[0], self.ms[0])
        kept = {"median_ms": self.median_ms, "quantile_20_ms": low, "quantile_80_ms": high}
        return kept | {"samples_ms": [round(ms, 5) for ms in self.ms]}


class Stopwatch:
    """Times ways on one device."""

    def __init__(self, device: torch.device, rounds: int, seconds: float) -> None:
        self.device, self._rounds, self._seconds = device, rounds, seconds
        if device.type == "cuda":
            self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def warm_up(self, way: Way) -> object:
        """Compiles and tunes; returns what the way returns for the first set of inputs."""
        for _ in range(WARM_UPS):
            found = way.prepare(0)()
        self._wait()
        return found

    def peak_bytes(self, way: Way) -> int | None:
        """What it allocates at its most beside what was there before, its results included; on a CPU not known."""
        if self.device.type != "cuda":
            return None
        run = way.prepare(0)
        self._wait()
        gc.collect()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        found = run()
        self._wait()
        del found
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def interleaved(self, ways: Sequence[Way], sets: int) -> tuple[dict[str, Samples], dict[str, str]]:
        """By name the samples, A B C A B C …, and the reasons of those that failed on the way.

        As many rounds as wanted, or, of what is slow, as fit into the seconds, but at least five.
        """
        taken: dict[str, list[float]] = {way.name: [] for way in ways}
        failed: dict[str, str] = {}
        began_s = time.monotonic()
        for number in range(self._rounds):
            if number >= 5 and time.monotonic() - began_s > self._seconds:
                break
            for way in ways:
                if way.name in failed:
                    continue
                try:
                    taken[way.name].append(self._sample(way, number % sets))
                except Exception as error:
                    failed[way.name] = reason(error)
        return {name: Samples(ms) for name, ms in taken.items() if name not in failed}, failed

    def _sample(self, way: Way, number: int) -> float:
        run = way.prepare(number)
        if self.device.type != "cuda":
            began_s = time.perf_counter()
            run()
            return (time.perf_counter() - began_s) * 1e3
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        self._cache.zero_()
        self._begin.record()
        found = run()
        self._end.record()
        self._wait()
        del found
        return float(self._begin.elapsed_time(self._end))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reason(error: Exception) -> str:
    """In one line; frees what a failed allocation left."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        gc.collect()
        torch.cuda.empty_cache()
        return "the GPU's memory does not suffice"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def clocks(device: torch.device, queried: str = QUERIED) -> dict[str, str]:
    """Of nvidia-smi, if there is one."""
    if device.type != "cuda":
        return {"absent": "no GPU"}
    command = ["nvidia-smi", f"--query-gpu={queried}", "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"absent": f"nvidia-smi: {error}"}
    return dict(zip(queried.split(","), (part.strip() for part in done.stdout.split(",")), strict=False))
