"""How much memory does each process of the demo's PPO take at its most?

The demo's models and settings under `rlhf run`, a few steps, several runs. By process: the peak of what it had in
memory (VmHWM, pages shared with others included), and the peak of its proportional share (PSS, sampled ten times a
second), which may be added up.
"""

from __future__ import annotations

from collections import defaultdict

from harness.bench import Figure, Measured, Options, interleaved, main
from harness.demo import demo_settings, make_models, run_ppo
from harness.machine import peak_rss_mib, pss_mib

Peaks = dict[str, dict[str, float]]
"""By kind ("rss", "pss"), by process: MiB."""


def measure(options: Options) -> Measured:
    make_models(options)
    settings = demo_settings(options, steps=options.size(6, 2))

    def one_run() -> Peaks:
        peaks: Peaks = {"rss": defaultdict(float), "pss": defaultdict(float)}
        run_ppo(settings, lambda pids: _sample(pids, peaks))
        return peaks

    runs = interleaved({"run": one_run}, options.size(3, 1))["run"]
    names = sorted(set.intersection(*(set(run["rss"]) for run in runs)))
    setup = {"steps": settings.ppo.steps, "batch_prompts": settings.ppo.batch_prompts}
    threads = {
        "policy": settings.policy.threads,
        "reward": settings.reward.threads,
        "reference": settings.reference.threads,
        "ppo": settings.ppo.threads,
    }
    figures = [
        *(Figure(f"{name}: resident at most", "MiB", [run["rss"][name] for run in runs]) for name in names),
        *(Figure(f"{name}: share of memory at most", "MiB", [run["pss"][name] for run in runs]) for name in names),
        Figure("all of these shares", "MiB", [sum(run["pss"].values()) for run in runs], headline=True),
    ]
    return Measured(figures, setup, threads, {"processes": names})


def _sample(pids: dict[str, int], peaks: Peaks) -> None:
    for name, pid in pids.items():
        try:
            now = {"rss": peak_rss_mib(pid), "pss": pss_mib(pid)}
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            continue  # it has just ended
        for kind, mib in now.items():
            peaks[kind][name] = max(peaks[kind][name], mib)


if __name__ == "__main__":
    main("memory", "How much memory does each process of the demo's PPO take at its most?", measure)
