"""Do rounds of feedback keep the judge's score rising, and do conservative ensembles keep it from falling?

The demo's world, whose judge is a classifier that neither policy nor reward model ever sees. One run makes what all
begin with: a policy, and a reward model of few rankings, whose members are models of their own. From there PPO goes as
far as the reward leads it, with a KL coefficient a third of the demo's:

    mean, worst          of the members, which stay as they are
    mean-variance 2, 8   their mean less so many times their variance
    three rounds         the mean, of members that are trained again after 1, 3 and 5 sevenths of the steps, on
                         judgments of the newest policy's completions too (`feedback.rounds`)

Snapshots along a run are measured on held-out prompts; gains are over the initial policy, paired by prompt. Runs of one
seed have the same prompts and random numbers. A finished run is not repeated. The curves are drawn into
`feedback-loop.png` beside the figures.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The folder of this file makes way: its modules are the package `feedback`.
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from harness.bench import Figure, Measured, Options, main, say
from harness.demo import DEMO, rlhf_run
from rlhf.evaluate.plots import LOOK
from rlhf.evaluate.results import Point, read_frontier
from rlhf.settings.loader import load_settings
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings
from rlhf.supervisor.group import child_environment

MODELS_RUN = "bench-loop-models"
RANKED, MEMBERS = 250, 4
SEEDS = (0, 1)
STEPS, LR, KL_COEF = 42, 2e-4, 0.05
ROUNDS, JUDGED = 3, 200
"""Rounds, and prompts ranked in each."""
PLAIN, LOOP, CONSERVATIVE = "mean", "three rounds", ("worst", "mean-variance 2", "mean-variance 8")
WAYS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    "worst": {"reward.aggregation": "worst"},
    **{f"mean-variance {n}": {"reward.aggregation": "mean-variance", "reward.variance_lambda": n} for n in (2, 8)},
    LOOP: {"feedback.rounds": ROUNDS, "feedback.prompts": JUDGED, "feedback.audit_pairs": 0},
}
COLOURS = {
    PLAIN: "#b42318",
    "worst": "#175cd3",
    "mean-variance 2": "#7a5af8",
    "mean-variance 8": "#dc6803",
    LOOP: "#067647",
}
TIMEOUT_S = 1800.0

Curves = Mapping[str, Sequence[Sequence[Point]]]
"""By way and seed: the snapshots, in the order of training."""


def measure(options: Options) -> Measured:
    base = _base(options)
    seeds = SEEDS[: options.size(len(SEEDS), 1)]
    curves = {
        way: [_points(_settings(options, base, way, seed)) for seed in seeds]
        for way in (WAYS if not options.quick else (PLAIN, LOOP))
    }
    draw(options.out / "feedback-loop.png", curves)
    setup = {
        "rankings of the first reward model": options.size(RANKED, 40),
        "members": options.size(MEMBERS, 2),
        "steps": options.size(STEPS, 7),
        "kl.coef": KL_COEF,
        "lr": LR,
        "rankings of a round": options.size(JUDGED, 8),
        "seeds": len(seeds),
    }
    checks = {
        f"{way}, seed {seed}": [[round(point.kl, 2), round(point.judge_gain, 3)] for point in run]
        for way, runs in curves.items()
        for seed, run in zip(seeds, runs, strict=True)
    }
    return Measured(figures(curves), setup, {"ppo": 2, "policy": 1, "reward": 1}, {"KL and judge's gain": checks})


def figures(curves: Curves) -> list[Figure]:
    found = []
    for way, runs in curves.items():
        found += [
            Figure(f"{way}: judge's gain at the end", "", [run[-1].judge_gain for run in runs], headline=True),
            Figure(f"{way}: deepest fall of the judge's score", "", [fall(run) for run in runs], headline=True),
            Figure(f"{way}: KL at the end", "nats", [run[-1].kl for run in runs]),
        ]
    for way in (*CONSERVATIVE, LOOP):
        pairs = list(zip(curves.get(way, ()), curves[PLAIN], strict=way in curves))
        if pairs:
            above = [run[-1].judge_gain - plain[-1].judge_gain for run, plain in pairs]
            spared = [fall(plain) - fall(run) for run, plain in pairs]
            found += [
                Figure(f"{way}: above the mean at the end", "", above),
                Figure(f"{way}: of the mean's deepest fall it is spared", "", spared, at_least=0.0, headline=True),
            ]
    for number, gains in enumerate(zip(*map(at_rounds, curves[LOOP]), strict=True), start=1):
        name = f"{LOOP}: rise of the judge's score from round {number} to " + (
            f"round {number + 1}" if number < ROUNDS else "the end"
        )
        found.append(Figure(name, "", gains, at_least=0.0, headline=True))
    return found


def fall(run: Sequence[Point]) -> float:
    """How far the judge's score comes to lie below what it had been before, the initial policy's included."""
    gains = np.array([0.0, *(point.judge_gain for point in run)])
    return float((np.maximum.accumulate(gains) - gains).max())


def at_rounds(run: Sequence[Point]) -> list[float]:
    """Rises of the judge's score between the policies that the rounds have asked about, and to the last one."""
    gains = [point.judge_gain for point in run]
    # Round n is at (2 n - 1) sevenths of the steps, and there are seven snapshots.
    asked = [gains[2 * number] for number in range(ROUNDS)] + [gains[-1]]
    return np.diff(asked).tolist()


def draw(path: Path, curves: Curves) -> None:
    with matplotlib.rc_context(LOOK):
        figure = Drawing(figsize=(8.4, 3.6), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        for axes, name, label in zip(
            figure.subplots(1, 2),
            ("proxy_gain", "judge_gain"),
            ("first model's reward", "judge's score"),
            strict=True,
        ):
            axes.set(xlabel="√KL to the initial policy, √nats", ylabel=f"change of the {label}")
            axes.axhline(0, color="#98a2b3", linewidth=0.9)
            for way, runs in curves.items():
                for number, run in enumerate(runs):
                    d, gain = np.sqrt([point.kl for point in run]), [getattr(point, name) for point in run]
                    axes.plot(
                        [0, *d], [0, *gain], marker="o", markersize=3, linewidth=1.2, color=COLOURS[way],
                        alpha=1.0 if number == 0 else 0.45, label=way if number == 0 and name == "judge_gain" else None,
                    )  # fmt: skip
            axes.set_xlim(left=0)
        figure.legend(loc="outside upper center", ncols=len(curves))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Software": None})


def _base(options: Options) -> RunPaths:
    paths = RunPaths(options.runs / MODELS_RUN)
    own = {
        **_common(options),
        "run.name": MODELS_RUN,
        "run.stages": '["world", "pretrain", "sample", "rank", "reward-model"]',
        "sample.limit": options.size(RANKED, 40),
    }
    say("  what all begin with")
    _run(load_settings(files=[DEMO], overrides=_overrides(own)))
    return paths


def _points(settings: Settings) -> list[Point]:
    say(f"  {settings.run.name}")
    _run(settings)
    return [point for point in read_frontier(settings.paths.frontier).points if point.form == "rl"]


def _settings(options: Options, base: RunPaths, way: str, seed: int) -> Settings:
    steps = options.size(STEPS, 7)
    own = {
        **_common(options),
        "run.name": f"bench-loop-{way.replace(' ', '-')}-{seed}",
        "run.stages": '["ppo", "evaluate"]',
        "run.model": base.pretrained,
        "reward.model": base.reward_model,
        "critic.model": base.reward_model,
        "rank.samples": base.samples,
        "reward_model.comparisons": base.comparisons,
        "ppo.prompts": base.prompts,
        "ppo.steps": steps,
        "ppo.lr": LR,
        "ppo.seed": seed,
        "ppo.snapshot_every": steps // 7,
        "ppo.keep_snapshots": 7,
        "kl.coef": KL_COEF,
        "evaluate.reward_model": base.reward_model,
        "evaluate.prompts": base.heldout_prompts,
        "evaluate.judge": base.labelled,
        "evaluate.frontier": "true",
        "evaluate.frontier_samples": 2,
        "evaluate.frontier_completions": 1,
        **WAYS[way],
    }
    if options.quick:
        own |= {"ppo.batch_prompts": 8, "ppo.epochs": 1, "evaluate.limit": 8, "feedback.prompts": 8}
    return load_settings(files=[DEMO], overrides=_overrides(own))


def _common(options: Options) -> dict[str, Any]:
    full = {
        "run.folder": options.runs,
        "run.min_judge_gain": "none",
        "reward_model.members": options.size(MEMBERS, 2),
        "reward_model.trunk": "separate",
        "feedback.rounds": 0,
    }
    tiny = {
        "world.texts": 400,
        "world.prompts": 100,
        "pretrain.vocab_size": 400,
        "pretrain.hidden_size": 16,
        "pretrain.layers": 1,
        "pretrain.heads": 2,
        "pretrain.steps": 5,
    }
    return full | tiny if options.quick else full


def _run(settings: Settings) -> None:
    settings.paths.folder.mkdir(parents=True, exist_ok=True)
    config = settings.paths.folder / "config.json"
    config.write_text(settings.model_dump_json())
    with (settings.paths.folder / "bench.log").open("a") as log:
        environment = child_environment(os.environ)
        subprocess.run(rlhf_run(config), stdout=log, stderr=log, env=environment, timeout=TIMEOUT_S, check=True)


def _overrides(own: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in own.items()]


if __name__ == "__main__":
    main("feedback-loop", "Does the loop keep the judge's score rising, and do conservative ensembles?", measure)
