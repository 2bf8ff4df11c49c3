"""What do log-probs from hidden states cost on a CPU, against log_softmax over all of the logits?

4096 tokens, hidden 768, 50257 labels, float32, one thread. Every way is measured in fresh processes, in turn: the
seconds of one run, and its peak of memory above what the process with its inputs has. Forward alone: log-probs without
gradient. Forward and backward: PPO's loss, and its gradient by hidden states and output layer; the results count as
memory.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from harness.bench import Figure, Measured, Options, interleaved, main
from harness.linear_ways import WAYS

TIMEOUT_S = 300.0
EAGER = "log_softmax of all logits"
CHECKED = 1e-3
"""By how much sums over all tokens may differ between ways, relative to their size."""


def measure(options: Options) -> Measured:
    sizes = {
        "tokens": options.size(4096, 1024),
        "vocabulary": options.size(50257, 4096),
        "hidden": options.size(768, 16),
    }
    ways = {name: functools.partial(_fresh, name, *sizes.values()) for name in WAYS}
    found = interleaved(ways, options.size(3, 1))
    figures = [figure for stage in ("forward", "forward and backward") for figure in _figures(stage, found)]
    checks = {name: {"sum": runs[0]["sum"]} for name, runs in found.items()}
    _expect_same_sums(checks)
    return Measured(figures, {**sizes, "dtype": "float32"}, {"torch": 1}, checks)


def _figures(stage: str, found: dict[str, list[dict[str, float]]]) -> list[Figure]:
    """Memory and time of every way at one stage; of ours beside plain torch's of the same round."""
    eager = found[f"{stage}: {EAGER}"]
    figures = []
    for name, runs in found.items():
        if name.partition(": ")[0] != stage:
            continue
        figures += [
            Figure(f"{name}: memory", "MiB", [run["peak_mib"] for run in runs]),
            Figure(f"{name}: time", "s", [run["seconds"] for run in runs]),
        ]
        if name != f"{stage}: {EAGER}":
            both = list(zip(runs, eager, strict=True))
            less = [plain["peak_mib"] / own["peak_mib"] for own, plain in both]
            times = [own["seconds"] / plain["seconds"] for own, plain in both]
            figures += [
                Figure(f"{name}: times less memory", "×", less, at_least=4, headline=True),
                Figure(f"{name}: time / {EAGER}", "×", times, at_most=1.1, headline=True),
            ]
    return figures


def _fresh(name: str, tokens: int, vocab: int, hidden: int) -> dict[str, float]:
    """Seconds, MiB and the sum of results of one run in a process of its own."""
    command = [sys.executable, "-m", "harness.linear_ways", name, str(tokens), str(vocab), str(hidden)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    here = Path(__file__).parent
    done = subprocess.run(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _expect_same_sums(checks: dict[str, dict[str, float]]) -> None:
    for stage in ("forward", "forward and backward"):
        sums = [check["sum"] for name, check in checks.items() if name.partition(": ")[0] == stage]
        if max(sums) - min(sums) > CHECKED * max(map(abs, sums)):
            raise ValueError(f"{stage}: results differ, so nothing is compared: {sums}")


if __name__ == "__main__":
    main("linear", "What do log-probs from hidden states cost on a CPU, against log_softmax of all logits?", measure)
