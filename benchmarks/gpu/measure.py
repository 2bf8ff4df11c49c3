"""One case at one shape: everybody warmed up, checked and timed in turn with the parts of the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu.cases import Bar, Case, errors, truth
from gpu.ceilings import Ceilings, Part, total_ms
from gpu.peers import Absent
from gpu.providers import Outputs, Provider
from gpu.shapes import Shape
from gpu.timing import Samples, Stopwatch, Way, clocks, reason

OURS = "ours"
PROFILED_RUNS = 3
PROFILED_KERNELS = 15


@dataclass
class _Provided:
    """What is known of one provider so far."""

    provider: Provider
    way: Way
    absent: str | None = None
    errors: dict[str, float] | None = None
    peak_bytes: int | None = None
    samples: Samples | None = None

    def as_json(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"note": self.provider.note} if self.provider.note else {}
        if self.absent is not None:
            return kept | {"absent": self.absent}
        assert self.samples is not None
        return kept | self.samples.as_json() | {"peak_bytes": self.peak_bytes, "largest_errors": self.errors}


def measure(
    case: Case, shape: Shape, sets: Sequence[Any], ceilings: Ceilings, stopwatch: Stopwatch, without: Sequence[str]
) -> dict[str, Any]:
    """What the results hold of this case at this shape."""
    before = clocks(stopwatch.device)
    rows, exact = truth(case, sets[0])
    left_out = {one.name for one in case.providers() if any(word in one.name for word in without)} - {OURS}
    chosen = [provider for provider in case.providers() if provider.name not in left_out]
    provided = [_Provided(provider, _way(provider, sets)) for provider in chosen]
    for one in provided:
        _try(one, stopwatch, rows, exact)
    parts = case.ceiling(ceilings, shape)
    ways = {part.way.name: part.way for part in parts} | {one.way.name: one.way for one in provided if not one.absent}
    for part in parts:
        stopwatch.warm_up(part.way)
    samples, failed = stopwatch.interleaved(list(ways.values()), len(sets))
    for one in provided:
        one.samples, one.absent = samples.get(one.way.name), one.absent or failed.get(one.way.name)
    medians_ms = {name: found.median_ms for name, found in samples.items()}
    own = next(one for one in provided if one.provider.name == OURS)
    bars = _bars(case, shape, parts, medians_ms, provided)
    result = {
        "case": case.name,
        "what": case.what,
        "shape": {"tokens": shape.tokens, "hidden": shape.hidden, "vocabulary": shape.vocab, "dtype": "bfloat16"},
        "judged": shape.judged,
        "input_sets": len(sets),
        "ceiling": _ceiling(parts, samples, ceilings),
        "providers": {one.provider.name: one.as_json() for one in provided},
        "bars": [bar.as_json() for bar in bars],
        "clocks": {"before": before, "after": clocks(stopwatch.device)},
    }
    if shape.judged and not own.absent and not all(bar.met for bar in bars):
        result["profile"] = _profile(own.way, stopwatch.device)
    # A compiled function keeps what it was compiled for, and there is a limit to how much.
    torch._dynamo.reset()
    return result


def _way(provider: Provider, sets: Sequence[Any]) -> Way:
    return Way(provider.name, lambda number: provider.prepare(sets[number]))


def _try(one: _Provided, stopwatch: Stopwatch, rows: torch.Tensor, exact: Outputs) -> None:
    """Warms up and checks; whatever goes wrong with a provider is its result."""
    try:
        found = stopwatch.warm_up(one.way)
        one.errors = errors(found, rows, exact)  # type: ignore[arg-type]
        del found
        one.peak_bytes = stopwatch.peak_bytes(one.way)
    except Absent as absent:
        one.absent = str(absent)
    except Exception as error:
        one.absent = reason(error)


def _bars(
    case: Case, shape: Shape, parts: Sequence[Part], medians_ms: dict[str, float], provided: Sequence[_Provided]
) -> list[Bar]:
    bars = []
    if case.share is not None:
        own_ms = medians_ms.get(OURS)
        share = total_ms(parts, medians_ms) / own_ms if own_ms else None
        bars.append(Bar("share of the ceiling", share, at_least=case.share))
    return [*bars, *case.bars(shape, medians_ms, {one.provider.name: one.peak_bytes for one in provided})]


def _ceiling(parts: Sequence[Part], samples: dict[str, Samples], ceilings: Ceilings) -> dict[str, Any] | None:
    if not parts:
        return None
    medians_ms = {part.way.name: samples[part.way.name].median_ms for part in parts}
    return {
        "ms": total_ms(parts, medians_ms),
        "parts": {part.way.name: {"times": part.times, **samples[part.way.name].as_json()} for part in parts},
        "speeds": ceilings.speeds(medians_ms),
    }


def _profile(way: Way, device: torch.device) -> list[dict[str, Any]]:
    """The kernels that take longest, of a few runs."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    runs = [way.prepare(0) for _ in range(PROFILED_RUNS)]
    with torch.profiler.profile(activities=kinds) as profiler:
        for run in runs:
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    by_time = sorted(profiler.key_averages(), key=lambda event: -_self_us(event, device))
    return [
        {"name": event.key[:160], "calls": event.count, "ms_each_run": _self_us(event, device) / 1e3 / PROFILED_RUNS}
        for event in by_time[:PROFILED_KERNELS]
    ]


def _self_us(event: Any, device: torch.device) -> float:
    return float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
