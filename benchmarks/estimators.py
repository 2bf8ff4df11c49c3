"""Which advantage estimator brings the most reward at equal distance from the initial policy, and in what time?

The real sentences' run (`rlhf run configs/movie-reviews.toml`) has made policy, reward model and prompts; from them
every estimator starts a PPO run of its own, with the same settings, seed and number of completions in a step. Those
that compare a prompt's completions get four of a quarter of the prompts. Snapshots along each run are measured on the
held-out prompts: the judge's gain over the initial policy against KL, read between snapshots at the same KL for all.
What a step takes is measured apart, in short runs one after the other: nothing else may compute then. A finished run is
not repeated.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from itertools import pairwise

from harness.bench import Figure, Measured, Options, main, say
from harness.demo import DEMO, MODELS_RUN, make_models, rlhf_run, run_ppo
from harness.machine import ROOT
from rlhf.evaluate.results import Point, read_evaluation, read_frontier
from rlhf.settings.loader import load_settings, with_overrides
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings
from rlhf.supervisor.group import child_environment

CONFIG = ROOT / "configs" / "movie-reviews.toml"
ESTIMATORS = ("gae", "a2c", "rloo", "grpo", "reinforce++")
OF_GROUPS = {"rloo": 4, "grpo": 4}
"""Completions of a prompt, for those that compare them."""
AT_NATS, SHOWN_NATS = (2.0, 3.0, 4.0), 3.0
PHASES = ("wait", "train", "publish")
TIMEOUT_S = 7200.0


def measure(options: Options) -> Measured:
    if options.quick:
        make_models(options)
    base = RunPaths(options.runs / (MODELS_RUN if options.quick else "movie-reviews"))
    if not base.pretrained.is_dir():
        raise SystemExit(
            f"{base.folder}: not there; make it with: rlhf run {CONFIG.relative_to(ROOT)} --set data.folder=…"
        )
    tried = ("gae", "reinforce++") if options.quick else ESTIMATORS
    runs = {name: _settings(options, base, name) for name in tried}
    for name, settings in runs.items():
        say(f"  {name}")
        _run(settings)
    figures = [figure for name, settings in runs.items() for figure in _quality(name, settings)]
    for name, settings in runs.items():
        say(f"  {name}: seconds")
        figures.append(Figure(f"{name}: a step", "s", _steps_s(settings, options.size(9, 2)), headline=True))
    one = runs["gae"]
    setup = {
        "steps": one.ppo.steps,
        "completions in a step": one.ppo.batch_prompts,
        "lr": one.ppo.lr,
        "kl.coef": one.kl.coef,
        "held-out prompts": one.evaluate.limit,
        "completions of a snapshot": one.evaluate.frontier_completions,
    }
    return Measured(figures, setup, {"ppo": one.ppo.threads, "policy": one.policy.threads})


def _settings(options: Options, base: RunPaths, name: str) -> Settings:
    completions = OF_GROUPS.get(name, 1)
    own = {
        "run.folder": options.runs / "estimators",
        "run.name": name.replace("+", "p"),
        "run.stages": '["ppo", "evaluate"]',
        "run.model": base.pretrained,
        "run.min_judge_gain": "none",
        "feedback.rounds": 0,
        "reward.model": base.reward_model,
        "critic.model": base.reward_model,
        "ppo.prompts": base.prompts,
        "ppo.estimator": name,
        "ppo.steps": 40,
        "ppo.batch_prompts": options.size(128, 8) // completions,
        "ppo.completions": completions,
        "evaluate.reward_model": base.reward_model,
        "evaluate.prompts": base.heldout_prompts,
        "evaluate.judge": base.labelled,
        "evaluate.frontier": "true",
        "evaluate.frontier_samples": 2,
        "evaluate.frontier_completions": 1,
        "evaluate.limit": 256,
    }
    if name == "a2c":
        own["ppo.minibatches"] = 1
    if options.quick:
        own |= {"ppo.steps": 2, "ppo.snapshot_every": 1, "ppo.epochs": 1, "evaluate.limit": 8}
    file = DEMO if options.quick else CONFIG
    return load_settings(files=[file], overrides=[f"{key}={value}" for key, value in own.items()])


def _run(settings: Settings) -> None:
    settings.paths.folder.mkdir(parents=True, exist_ok=True)
    config = settings.paths.folder / "config.json"
    config.write_text(settings.model_dump_json())
    with (settings.paths.folder / "bench.log").open("a") as log:
        environment = child_environment(os.environ)
        subprocess.run(rlhf_run(config), stdout=log, stderr=log, env=environment, timeout=TIMEOUT_S, check=True)


def _steps_s(settings: Settings, steps: int) -> list[float]:
    """Of each step but the first, in which the services warm up, in a run of so many."""
    own = {"run.name": f"timed-{settings.run.name}", "run.stages": '["ppo"]', "ppo.steps": steps}
    own |= {"ppo.snapshot_every": 0, "ppo.checkpoint_every": 10**6}
    rows = run_ppo(with_overrides(settings, [f"{key}={value}" for key, value in own.items()]), lambda pids: None)
    return [sum(row[f"seconds_{phase}"] for phase in PHASES) for row in rows[1:]]


def _quality(name: str, settings: Settings) -> list[Figure]:
    points = [point for point in read_frontier(settings.paths.frontier).points if point.form == "rl"]
    after = read_evaluation(settings.paths.evaluation).figures
    figures = [
        Figure(f"{name}: judge's gain at the end", "", [after["judge_gain"]]),
        Figure(f"{name}: KL at the end", "nats", [after["kl"]]),
    ]
    for nats in AT_NATS:
        gain = gain_at(points, nats)
        if gain is not None:
            figures.append(Figure(f"{name}: judge's gain at {nats:g} nats", "", [gain], headline=nats == SHOWN_NATS))
    return figures


def gain_at(points: Sequence[Point], nats: float) -> float | None:
    """The judge's gain at that KL, on straight lines between the policies of a run; None: the run did not go so far."""
    at = [(0.0, 0.0), *sorted((point.kl, point.judge_gain) for point in points)]
    for (near, low), (far, high) in pairwise(at):
        if near <= nats <= far:
            return low + (high - low) * (nats - near) / (far - near)
    return None


if __name__ == "__main__":
    main("estimators", "Which advantage estimator brings the most reward at equal KL, and in what time?", measure)
