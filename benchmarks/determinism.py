"""What does `run.deterministic` cost, and what does it cost to keep the rollouts?

The demo's models and settings under `rlhf run`, a few steps, as they are and deterministic in turn. All deterministic
runs must make the very same weights at every step; of the others it is only said whether they did. Rollouts are kept
either way: what that takes is measured afterwards, by keeping each step of a run once more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from harness.bench import Figure, Measured, Options, expect_equal, interleaved, main, scratch
from harness.demo import demo_settings, make_models, run_ppo
from rlhf.ppo.history import History
from rlhf.settings.run import Settings

PHASES = ("wait", "train", "publish")
Metrics = Sequence[dict[str, float]]


def measure(options: Options) -> Measured:
    make_models(options)
    plain = demo_settings(options, steps=options.size(8, 3))
    fixed = plain.model_copy(update={"run": plain.run.model_copy(update={"deterministic": True})})

    def one_run(settings: Settings) -> tuple[Metrics, tuple[str, ...]]:
        metrics = run_ppo(settings, lambda pids: None)
        history = History(settings.paths.history)
        # The first step waits for prompts to come at all.
        return metrics[1:], tuple(history.read(step).weights_after for step in history.steps())

    runs = interleaved(
        {"as it is": lambda: one_run(plain), "deterministic": lambda: one_run(fixed)}, options.size(3, 2)
    )
    expect_equal("weights", **{str(number): weights for number, (_, weights) in enumerate(runs["deterministic"])})
    seconds = {way: [_step_s(metrics) for metrics, _ in found] for way, found in runs.items()}
    pairs = zip(seconds["deterministic"], seconds["as it is"], strict=True)
    keeping = _keeping(fixed.paths.history)
    figures = [
        *(Figure(f"a step, {way}", "s", values, headline=True) for way, values in seconds.items()),
        Figure("deterministic / as it is", "×", [a / b for a, b in pairs], headline=True),
        *(
            Figure(f"{phase}, {way}", "s", [_phase_s(metrics, phase) for metrics, _ in found])
            for phase in PHASES
            for way, found in runs.items()
        ),
        Figure("keeping a step's rollouts", "ms", [1000 * s for s, _ in keeping], headline=True),
        Figure("size of a step's rollouts, kept", "KiB", [size / 1024 for _, size in keeping], headline=True),
    ]
    setup = {
        "steps": plain.ppo.steps,
        "batch_prompts": plain.ppo.batch_prompts,
        "max_sequences": plain.policy.max_sequences,
        "max_batch_tokens": plain.policy.max_batch_tokens,
    }
    threads = {
        "policy": plain.policy.threads,
        "reward": plain.reward.threads,
        "reference": plain.reference.threads,
        "ppo": plain.ppo.threads,
    }
    checks = {
        "different courses, as it is": len({weights for _, weights in runs["as it is"]}),
        "different courses, deterministic": len({weights for _, weights in runs["deterministic"]}),
    }
    return Measured(figures, setup, threads, checks)


def _step_s(metrics: Metrics) -> float:
    return median(sum(row[f"seconds_{phase}"] for phase in PHASES) for row in metrics)


def _phase_s(metrics: Metrics, phase: str) -> float:
    return median(row[f"seconds_{phase}"] for row in metrics)


def _keeping(folder: Path) -> list[tuple[float, int]]:
    """Of each step: seconds, and bytes."""
    found = []
    with scratch() as place:
        kept, again = History(folder), History(place, 2**40)
        for step in kept.steps():
            trained = kept.read(step)
            began_s = time.perf_counter()
            again.keep(trained)
            seconds = time.perf_counter() - began_s
            found.append((seconds, sum(path.stat().st_size for path in place.glob(f"{step:06d}*"))))
    return found


if __name__ == "__main__":
    main("determinism", "What does run.deterministic cost, and what does it cost to keep the rollouts?", measure)
