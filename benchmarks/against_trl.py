"""Samples a second of the whole system against TRL 1.12.0's PPOTrainer on the same work.

One Llama of 4.2 million parameters with a separate critic and reward model; 64 prompts of 16 tokens a step, responses
of 48, 4 epochs; two cores for either side, whatever it starts on them. This project runs as it is used: `rlhf run`
with policy, reward, reference, worker, Redis and trainer as processes of their own. TRL runs in one process, in the
environment that `make bench-trl` makes. Both in float32 and in bfloat16 (float32 master weights, Adam in float32), in
turn, run after run; the first step of each run is not counted. A processor that does not multiply bfloat16 numbers
itself is measured in float32 alone.

The floor of a step is its floating-point operations (harness/trl_work.py counts them) at the rate at which this machine
multiplies large matrices of that precision, measured between the runs.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness.bench import Figure, Measured, Options, expect_equal, interleaved, main, say
from harness.demo import run_ppo
from harness.machine import ROOT, pss_mib
from harness.trl_work import Folders, Operations, Work, make, operations
from rlhf.settings.loader import load_settings
from rlhf.settings.run import Settings

TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
TRL_SIDE = Path(__file__).parent / "harness" / "trl_side.py"
TIMEOUT_S = 900.0
PRECISIONS = ("float32", "bfloat16")
MEMORY_EVERY_S = 5.0
"""Reading the page tables of gigabytes stops their process for a while, and every step has its peak."""
WANTED_BF16, WANTED_FLOAT32, WANTED_OF_FLOOR = 3.0, 1.4, 0.4


@dataclass(frozen=True)
class Ran:
    """One run of one side."""

    step_s: list[float]
    """Of each step but the first."""
    phases_s: dict[str, list[float]]
    scores: list[float]
    """The reward model's mean in each step."""
    kl: list[float]
    peak_mib: float
    """Of the process, or of the processes' shares of memory together."""


def measure(options: Options) -> Measured:
    work = Work(steps=options.size(12, 3))
    if options.quick:
        work = replace(work, vocab_size=512, hidden_size=16, layers=1, heads=2, batch=8, prompts=32, epochs=2)
    folders = Folders(options.runs / "bench-trl-work")
    shutil.rmtree(folders.root, ignore_errors=True)
    parameters = make(work, folders)
    # All that either side starts inherits it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.threads])
    config = json.loads((folders.policy / "config.json").read_text())
    floor = operations(work, config["intermediate_size"])
    native = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    ways: dict[str, Any] = {}
    precisions = PRECISIONS if native or options.quick else ("float32",)
    for precision in precisions:
        ways[f"matmul {precision}"] = lambda p=precision: _matmul_flops(p, options, work)
        ways[f"this project, {precision}"] = lambda p=precision: _ours(options, work, folders, p)
        ways[f"TRL, {precision}"] = lambda p=precision: _trl(work, folders, p)
    found: dict[str, list[Any]] = interleaved(ways, options.size(2, 1))
    rates = {precision: found.pop(f"matmul {precision}") for precision in precisions}
    figures = [
        *_speeds(found, work, precisions, native=native),
        *_floors(found, rates, floor),
        *_curves(found),
        *_phases_and_memory(found, rates),
    ]
    setup = {
        **{
            name: getattr(work, name) for name in ("batch", "prompt_tokens", "response_tokens", "epochs", "steps", "lr")
        },
        "parameters": parameters,
        "GFLOP a step": round(floor.total / 1e9),
        "native bfloat16": native,
        "trl": _trl_version(),
    }
    threads = {"TRL": work.threads, "policy": 2, "ppo": 2, "reward": 1, "reference": 1}
    curves = {name: [[round(score, 3) for score in run.scores] for run in runs] for name, runs in found.items()}
    return Measured(figures, setup, threads, {"scores by step": curves})


def _speeds(found: dict[str, list[Ran]], work: Work, precisions: Sequence[str], *, native: bool) -> list[Figure]:
    rates = {name: [work.batch / statistics.median(run.step_s) for run in runs] for name, runs in found.items()}
    ours, theirs = ({p: rates[f"{side}, {p}"] for p in precisions} for side in ("this project", "TRL"))
    in_float32 = [a / b for a, b in zip(ours["float32"], theirs["float32"], strict=True)]
    figures = [
        *(Figure(name, "samples/s", values, headline=True) for name, values in rates.items()),
        Figure("this project / TRL, both float32", "x", in_float32, WANTED_FLOAT32, headline=True),
    ]
    if "bfloat16" in precisions:
        fastest = max(precisions, key=lambda p: statistics.median(theirs[p]))
        against_best = [a / b for a, b in zip(ours["bfloat16"], theirs[fastest], strict=True)]
        name, wanted = f"this project, bfloat16 / TRL at its fastest ({fastest})", WANTED_BF16 if native else None
        figures.append(Figure(name, "x", against_best, wanted, headline=True))
    return figures


def _floors(found: dict[str, list[Ran]], rates: dict[str, list[float]], floor: Operations) -> list[Figure]:
    def share(side: str, precision: str) -> list[float]:
        rate = statistics.median(rates[precision])
        return [floor.total / rate / statistics.median(run.step_s) for run in found[f"{side}, {precision}"]]

    return [
        Figure(
            f"{side}, {precision}: share of the floor",
            "x",
            share(side, precision),
            WANTED_OF_FLOOR if side == "this project" else None,
            headline=True,
        )
        for precision in rates
        for side in ("this project", "TRL")
    ]


def _curves(found: dict[str, list[Ran]]) -> list[Figure]:
    def last(run: Ran) -> float:
        return statistics.mean(run.scores[-max(1, len(run.scores) // 4) :])

    first = {name: [run.scores[0] for run in runs] for name, runs in found.items()}
    return [
        *(Figure(f"{name}: score in the first step", "reward", values) for name, values in first.items()),
        *(
            Figure(f"{name}: score over the last quarter of steps", "reward", [last(run) for run in runs])
            for name, runs in found.items()
        ),
        *(Figure(f"{name}: KL in the last step", "nats", [run.kl[-1] for run in runs]) for name, runs in found.items()),
    ]


def _phases_and_memory(found: dict[str, list[Ran]], rates: dict[str, list[float]]) -> list[Figure]:
    phases = [
        Figure(f"{name}: {phase}", "s", [statistics.median(run.phases_s[phase]) for run in runs])
        for name, runs in found.items()
        for phase in runs[0].phases_s
    ]
    memory = [Figure(f"{name}: peak memory", "MiB", [run.peak_mib for run in runs]) for name, runs in found.items()]
    speed = [Figure(f"matmul, {precision}", "GFLOP/s", [r / 1e9 for r in rate]) for precision, rate in rates.items()]
    return [*phases, *memory, *speed]


def _ours(options: Options, work: Work, folders: Folders, precision: str) -> Ran:
    settings = _settings(options, work, folders, precision)
    peak_mib, looked_s = 0.0, 0.0

    def watch(pids: dict[str, int]) -> None:
        nonlocal peak_mib, looked_s
        # The ppo process is the last that starts.
        if time.monotonic() - looked_s < MEMORY_EVERY_S or "ppo" not in pids:
            return
        looked_s = time.monotonic()
        peak_mib = max(peak_mib, sum(map(_share_mib, pids.values())))

    rows = run_ppo(settings, watch)
    expect_equal("steps", found=len(rows), wanted=work.steps)
    expect_equal("response tokens", found=rows[-1]["response_tokens_mean"], wanted=float(work.response_tokens))
    phases = {
        phase: [row[f"seconds_{name}"] for row in rows[1:]]
        for phase, name in (("generate and score", "wait"), ("train", "train"), ("publish", "publish"))
    }
    step_s = [sum(parts) for parts in zip(*phases.values(), strict=True)]
    return Ran(step_s, phases, [row["score_mean"] for row in rows], [row["kl_mean"] for row in rows], peak_mib)


def _settings(options: Options, work: Work, folders: Folders, precision: str) -> Settings:
    own = {
        "run.folder": options.runs,
        "run.name": "bench-trl",
        "run.stages": '["ppo"]',
        "run.model": folders.policy,
        "sampling.max_new_tokens": work.response_tokens,
        "sampling.temperature": work.temperature,
        # The sampled tokens' log-probs are computed again by the trainer, so generation may run in bfloat16.
        "policy.dtype": precision,
        "reward.dtype": precision,
        "reference.dtype": precision,
        "ppo.dtype": precision,
        "ppo.attention": work.attention,
        "policy.max_sequences": work.batch,
        "policy.threads": work.threads,
        # Both at once, when nothing else computes.
        "reward.threads": 1,
        "reference.threads": 1,
        "ppo.threads": work.threads,
        "reward.model": folders.reward_model,
        "critic.model": folders.reward_model,
        "rollouts.prompts_in_flight": work.batch,
        "ppo.prompts": folders.prompts,
        "ppo.steps": work.steps,
        "ppo.batch_prompts": work.batch,
        "ppo.epochs": work.epochs,
        "ppo.lr": work.lr,
        "critic.lr": work.lr,
        "ppo.adam_epsilon": work.adam_epsilon,
        "ppo.gamma": work.gamma,
        "ppo.gae_lambda": work.gae_lambda,
        "ppo.clip_range": work.clip_range,
        "kl.coef": work.kl_coef,
        "ppo.checkpoint_every": 10**6,
        "ppo.sample_every": 10**6,
        "ppo.seed": work.seed,
    }
    return load_settings(files=[], overrides=[f"{name}={value}" for name, value in own.items()])


def _trl(work: Work, folders: Folders, precision: str) -> Ran:
    out = folders.root / "trl.json"
    out.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "MKL_NUM_THREADS": str(work.threads)}
    environment |= {"ACCELERATE_MIXED_PRECISION": "bf16" if precision == "bfloat16" else "no"}
    command = [TRL_PYTHON, TRL_SIDE, folders.root, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"TRL failed: {done.stderr[-2000:]}")
    made = json.loads(out.read_text())
    expect_equal("precision", found=made["precision"], wanted=environment["ACCELERATE_MIXED_PRECISION"])
    phases = {name: values for name, values in made["seconds"].items() if name != "step"}
    return Ran(made["seconds"]["step"], phases, made["scores"], made["kl"], made["peak_rss_mib"])


def _matmul_flops(precision: str, options: Options, work: Work) -> float:
    """Operations a second of the fastest of some products of large matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    dtype = getattr(torch, precision)
    rates = [_product_flops(size, dtype) for size in ((64,) if options.quick else (512, 1024, 2048))]
    torch.set_num_threads(threads)
    say(f"    {max(rates) / 1e9:.0f} GFLOP/s")
    return max(rates)


def _product_flops(size: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, size, size).to(dtype)
    seconds: list[float] = []
    for _ in range(max(5, 2048 // size * 5)):
        began_s = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began_s)
    return 2.0 * size**3 / statistics.median(seconds)


def _share_mib(pid: int) -> float:
    try:
        return pss_mib(pid)
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0.0  # it has just ended


def _cpu_flags() -> Sequence[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split() for line in lines if line.startswith("flags")), [])


def _trl_version() -> str:
    code = "from importlib.metadata import version; print(version('trl'))"
    return subprocess.run([TRL_PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    if not TRL_PYTHON.exists():
        raise SystemExit("there is no .venv-trl; run `make bench-trl`, which makes it")
    main("trl", "How many samples a second, whole system, against TRL 1.12.0's PPO trainer?", measure)
