"""Every benchmark at sizes at which nothing is measured: it runs, compares equal work, and leaves every figure.

Scripts run in this process, and start whatever they start otherwise. One run of the demo's PPO, transport's, serves
three: in `make test-long` memory and determinism make their own.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import demo
from rlhf.settings.run import Settings
from support.scripts import run_script
from table import LONG_NAMES, NAMES, everything, headlines, load

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MAY_BE_NEGATIVE = ("extra gap", "with models: what the services add", "judge's gain")
MAY_BE_ZERO = ("computed by", "Redis' CPU", "the client's cores")
"""CPU seconds come in ticks of 10 ms."""
OF_WHOLE_RUNS = ("memory", "determinism", *LONG_NAMES)
"""Run after run of PPO."""
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
ALONE = SOME_FIGURES.keys() - {"transport", *OF_WHOLE_RUNS}


def test_every_benchmark_is_tried():
    assert set(SOME_FIGURES) == {*NAMES, *LONG_NAMES}
    assert all((BENCHMARKS / f"{name}.py").exists() for name in SOME_FIGURES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SOME_FIGURES if name in ALONE]
)
def test_a_benchmark_runs_and_leaves_its_figures(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, run(name, tmp_path))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OF_WHOLE_RUNS)
def test_a_benchmark_of_whole_runs_leaves_its_figures(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, run(name, tmp_path))


@dataclass(frozen=True)
class DemoRun:
    """A run of the demo's PPO that a benchmark has started."""

    out: Path
    result: dict[str, Any]
    """Of that benchmark."""
    metrics: list[dict[str, float]]
    names: set[str]
    """Of the processes that could be watched."""


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    out, names, steps, really = tmp_path_factory.mktemp("demo"), set[str](), list[dict[str, float]](), demo.run_ppo

    def run_ppo(settings: Settings, watch: Callable[[dict[str, int]], None]) -> list[dict[str, float]]:
        def look(pids: dict[str, int]) -> None:
            names.update(pids)
            watch(pids)

        steps.extend(really(settings, look))
        return steps

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "run_ppo", run_ppo)
        result = run("transport", out)
    return DemoRun(out, result, steps, names)


@pytest.mark.xdist_group("demo")
@pytest.mark.timeout(300)
def test_transport_takes_a_run_of_ppo_apart(demo_run: DemoRun) -> None:
    check("transport", demo_run.out, demo_run.result)
    assert len(demo_run.metrics) == demo_run.result["setup"]["steps"]
    assert demo_run.names == {"run", "redis", "policy-0", "reward", "reference", "worker-0", "ppo"}


@pytest.mark.xdist_group("demo")
def test_determinism_compares_runs_of_ppo(demo_run: DemoRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of runs, which are all the one that lies in the folder; models are there too."""
    deterministic = []

    def run_ppo(settings: Settings, watch: object) -> list[dict[str, float]]:
        deterministic.append(settings.run.deterministic)
        return demo_run.metrics

    monkeypatch.setattr(demo, "run_ppo", run_ppo)
    result = run("determinism", demo_run.out)
    check("determinism", demo_run.out, result)
    assert deterministic == [False, True] * 2
    assert result["checks"]["different courses, deterministic"] == 1
    kept = next(figure for figure in result["figures"] if figure["name"] == "size of a step's rollouts, kept")
    assert len(kept["values"]) == len(demo_run.metrics)


@pytest.mark.xdist_group("demo")
def test_memory_watches_every_process_of_a_run(demo_run: DemoRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process stands in for each, and one has ended before it is looked at."""

    def run_ppo(settings: Settings, watch: Callable[[Mapping[str, int]], None]) -> list[dict[str, float]]:
        watch({**dict.fromkeys(demo_run.names, os.getpid()), "ended": 2**22 + 1})
        return demo_run.metrics

    monkeypatch.setattr(demo, "run_ppo", run_ppo)
    result = run("memory", demo_run.out)
    check("memory", demo_run.out, result)
    assert set(result["checks"]["processes"]) == demo_run.names


def check(name: str, out: Path, result: dict[str, Any]) -> None:
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


def run(name: str, out: Path) -> dict[str, Any]:
    run_script(BENCHMARKS / f"{name}.py", "--quick", "--out", str(out))
    return json.loads((out / f"{name}.json").read_text())


def plausible(name: str, value: float) -> bool:
    if any(part in name for part in MAY_BE_NEGATIVE):
        return math.isfinite(value)
    return math.isfinite(value) and (value > 0 or (value == 0 and any(part in name for part in MAY_BE_ZERO)))
