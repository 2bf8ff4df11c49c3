"""Every benchmark at sizes at which nothing is measured: it runs, compares equal work, and leaves every figure."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from table import LONG_NAMES, NAMES, everything, headlines, load

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MAY_BE_NEGATIVE = ("extra gap", "with models: what the services add", "judge's gain")
MAY_BE_ZERO = ("computed by", "Redis' CPU", "the client's cores")
"""CPU seconds come in ticks of 10 ms."""
OF_THE_DEMO = ("transport", "memory", "determinism", "estimators")
SOME_FIGURES = {
    "generation": {
        "policy service / transformers generate",
        "open loop at 90% of capacity: latency p95",
        "open loop at 25% of capacity: time to first token p50",
    },
    "scaling": {"2 replicas / 1 replica", "engine, batch of 1", "engine, batch of 64"},
    "transport": {
        "without models: gRPC and Redis / PPO step",
        "without models: computed by worker",
        "with models: what the services add / PPO step",
    },
    "weights": {
        "extra gap of a commit, sequences finish on old weights",
        "new weights on 2 replicas, 64 calls in flight",
        "a new adapter on 2 replicas, idle",
        "bytes of an adapter",
    },
    "queues": {"4 KiB: both at once", "64 KiB: Redis' peak memory", "64 KiB: refused, stream full"},
    "linear": {
        "forward: fused_linear_logprobs: times less memory",
        "forward and backward: fused_linear_ppo_loss: time / log_softmax of all logits",
    },
    "determinism": {"deterministic / as it is", "a step, deterministic", "size of a step's rollouts, kept"},
    "estimators": {"gae: judge's gain at the end", "reinforce++: a step"},
    "memory": {f"{name}: share of memory at most" for name in ("policy-0", "reward", "reference", "worker-0", "ppo")},
}


def test_every_benchmark_is_tried():
    assert set(SOME_FIGURES) == {*NAMES, *LONG_NAMES}
    assert all((BENCHMARKS / f"{name}.py").exists() for name in SOME_FIGURES)


def marks_of(name):
    """Those that share models run in one process; those that take many runs of PPO, in `make test-long`."""
    group = pytest.mark.xdist_group("demo" if name in OF_THE_DEMO else name)
    return [group, pytest.mark.long] if name in LONG_NAMES else [group]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all, because transport, memory and determinism use the same models."""
    return tmp_path_factory.mktemp("benchmarks")


# A dozen processes that import torch, one after the other: a minute on a machine that is busy.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks_of(name)) for name in SOME_FIGURES],
)
def test_a_benchmark_runs_and_leaves_its_figures(name, out):
    result = run(name, out)
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert SOME_FIGURES[name] <= set(figures)
    for figure in result["figures"]:
        assert figure["min"] <= figure["median"] <= figure["max"]
        assert figure["unit"]
        assert all(plausible(figure["name"], value) for value in figure["values"]), figure
    assert result["quick"]
    assert result["threads"]
    assert result["setup"]
    assert {"cpu", "cores", "memory_gib", "os", "python", "versions", "date", "commit"} == set(result["machine"])
    if name in ("generation", "scaling"):
        assert len(set(result["checks"]["tokens"].values())) == 1
    assert name in headlines(load(out))
    assert all(figure in everything(load(out)) for figure in figures)


def run(name, out):
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--out", out]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=590, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / f"{name}.json").read_text())


def plausible(name, value):
    if any(part in name for part in MAY_BE_NEGATIVE):
        return math.isfinite(value)
    return math.isfinite(value) and (value > 0 or (value == 0 and any(part in name for part in MAY_BE_ZERO)))
