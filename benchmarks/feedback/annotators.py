"""What do bad annotators cost the reward model, and what becomes of people who honestly differ?

Twenty annotators, 60 rankings of four completions each, 400 prompts, ten seeds. For one seed every way sees the same
prompts, tastes and assignments, so differences are paired; `checks` in the result has their means with 95 % intervals.

Bad annotators: six of the twenty turn their rankings upside down, click at random, or do what no model here assumes
(err more on harder prompts, read half of what they rank and leave the rest as shown). Beside the model of annotators:
plain Plackett-Luce on all-clean labels of the same budget, and naive Bradley-Terry on the same labels.

Minority: six of twenty have a taste of their own, three click at random. Four gold rankings and four repeats each.
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The folder of this file makes way: its modules are the package `feedback`.
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

import numpy as np

from feedback.intervals import interval
from feedback.seeds import THREADS, by_seed
from feedback.world import STEPS, Training, accuracy, auc, learn, make, own_accuracies, verdicts
from harness.bench import Figure, Measured, Options, main
from rlhf.preference.reliability import BAD

PEOPLE, BAD_PEOPLE = 20, 6
SAME = "Plackett-Luce, all clean"
OURS, NAIVE = "with reliability", "naive Bradley-Terry"
COST_AT_MOST = {"adversarial": 1.0, "random": 1.5, "none": 0.3}
"""Points of accuracy below all-clean training."""
BEYOND = ("hasty", "lazy")
STEPS_IF_QUICK = 20


def measure(options: Options) -> Measured:
    seeds = options.size(10, 2)
    sizes = {"per": options.size(60, 12), "prompts": options.size(400, 40)}
    training = Training(steps=options.size(STEPS, STEPS_IF_QUICK))
    ran = by_seed(partial(_one, sizes, training), seeds, options)
    found = {name: [one[name] for one in ran] for name in ran[0]}
    setup = {"seeds": seeds, "annotators": PEOPLE, "rankings_each": sizes["per"], "prompts": sizes["prompts"]}
    intervals = {name: interval(values) for name, values in found.items()}
    return Measured([_figure(name, values) for name, values in found.items()], setup, THREADS, intervals)


def _one(sizes: dict[str, int], training: Training, seed: int) -> dict[str, float]:
    return {**_bad_annotators(seed, sizes, training), **_minority(seed, sizes, training)}


def _bad_annotators(seed: int, sizes: dict[str, int], training: Training) -> dict[str, float]:
    clean = make(["honest"] * PEOPLE, seed=seed, **sizes)
    best = 100 * accuracy(learn(clean, "plackett-luce", "none", seed, training).rewards, clean.majority)
    found = {SAME: best}
    for kind in (*COST_AT_MOST, *BEYOND):
        bad = [kind] * BAD_PEOPLE if kind != "none" else []
        world = make([*bad, *["honest"] * (PEOPLE - len(bad))], seed=seed, **sizes)
        ours = learn(world, "plackett-luce", "reliability", seed, training)
        naive = learn(world, "all-pairs", "none", seed, training)
        label = f"30 % {kind}" if bad else "none bad"
        accuracies = {OURS: accuracy(ours.rewards, world.majority), NAIVE: accuracy(naive.rewards, world.majority)}
        found |= {f"{label}: {way}": 100 * value for way, value in accuracies.items()}
        found |= {f"{label}: cost {way}": best - 100 * value for way, value in accuracies.items()}
        if kind in ("adversarial", "random"):
            found[f"{label}: AUC of bad against honest"] = auc(ours.honest, world.those(kind))
    return found


def _minority(seed: int, sizes: dict[str, int], training: Training) -> dict[str, float]:
    kinds = ["minority"] * 6 + ["random"] * 3 + ["honest"] * 11
    world = make(kinds, seed=seed, **sizes)
    by_way = {
        way: learn(world, loss, model, seed, training)
        for way, loss, model in (
            ("with tastes", "plackett-luce", "groups"),
            ("reliability alone", "plackett-luce", "reliability"),
            (NAIVE, "all-pairs", "none"),
        )
    }
    found: dict[str, float] = {}
    for way, learnt in by_way.items():
        found |= {f"{side}: {way}": value for side, value in own_accuracies(world, learnt).items()}
    found["majority: loss by tastes"] = found["majority: reliability alone"] - found["majority: with tastes"]
    called = np.array(verdicts(world, by_way["with tastes"]))
    for kind in ("minority", "random", "honest"):
        found[f"{kind} called bad"] = 100 * float(np.isin(called[world.those(kind)], list(BAD)).mean())
    return found


def _figure(name: str, values: list[float]) -> Figure:
    unit = "" if "AUC" in name else "%" if "called" in name else "points" if "cost" in name or "loss" in name else "%"
    wanted: dict[str, float] = {}
    for kind, most in COST_AT_MOST.items():
        if name == f"{'none bad' if kind == 'none' else f'30 % {kind}'}: cost {OURS}":
            wanted["at_most"] = most
    if "AUC" in name:
        wanted["at_least"] = 0.95
    wanted |= {
        "minority: with tastes": {"at_least": 88.0},
        "majority: loss by tastes": {"at_most": 3.0},
        "minority called bad": {"at_most": 5.0},
    }.get(name, {})
    return Figure(name, unit, values, headline=bool(wanted) or f"cost {NAIVE}" in name, **wanted)


if __name__ == "__main__":
    main("feedback-annotators", "What do bad annotators cost the reward model, and who is lost by it?", measure)
