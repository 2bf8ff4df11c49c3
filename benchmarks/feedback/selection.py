"""Does asking what the members disagree about save labels?

The small world of `world`, honest annotators, and rounds as the product has them: of twice as many prompts as will be
ranked, 30 % of the rankings are drawn at random and kept out of this round's training, the others by BALD over five
members, each a network of its own, trained again from the start on prompts drawn with replacement. `choose`, `bald`,
`worth_of_active` and the draws are the product's. Promotion is left out: every refreshed model is used.

    at random         the same rounds with the others drawn at random too
    BALD              never given up
    BALD, fall-back   at random from the round on in which the last two rounds' active labels were worth no more
    logit variance    in BALD's place the variance of the members' differences, known as a bad choice

For one seed all begin with the same rankings and meet the same candidates, and a prompt gets the same ranking whoever
asks, so differences are paired. `checks` has means with 95 % intervals; that of the share of labels is a bootstrap over
seeds. Labels are counted when they are asked for, so those kept out count.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The folder of this file makes way: its modules are the package `feedback`.
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feedback.intervals import interval
from feedback.seeds import THREADS, by_seed
from feedback.world import COMPLETIONS, DECAY, HIDDEN, LR, NOISE, WIDTH, Floats, accuracy, completions, taste
from harness.bench import Figure, Measured, Options, main, say
from rlhf.feedback.judgments import CompletionShown, Judgment
from rlhf.preference.annotators import Annotator, Shown, ranks_of
from rlhf.preference.loss import RankingLoss
from rlhf.preference.rankings import Ranking, rankings_of
from rlhf.rounds.measures import worth_of_active
from rlhf.rounds.selection import bald, choose, is_given_up

ROUNDS, MEMBERS = 9, 5
STEPS = 100
CANDIDATES, RANDOM_SHARE = 2, 0.3
"""The defaults of the settings."""
FEWER = 0.7
"""Of the labels, with which active selection is to be as accurate: seven of ten parts, the first among them."""
RANDOM, BALD, FALLING_BACK, LOGITS = "at random", "BALD", "BALD, fall-back", "logit variance"
WAYS = (RANDOM, BALD, FALLING_BACK, LOGITS)
RESAMPLED = 4000
WORLDS = {"": 0.0, "uneven: ": 0.8}
"""Prefix of the figures' names, and how uneven the prompts are."""
NO_WORSE = -0.5
"""Points, by which the fall-back may be below random with as many labels."""

Key = tuple[int, int]
"""Round, and number among its candidates; round 0 is what all begin with."""
Worth = Callable[[Floats], Floats]


@dataclass(frozen=True)
class World:
    seed: int
    rounds: list[Floats]
    """[candidates, COMPLETIONS, WIDTH] of each round; 0: what all begin with."""
    test: Floats
    utilities: Floats
    """[prompts, COMPLETIONS], true ones of the test completions."""
    ranks: dict[Key, tuple[int, ...]]
    """What whoever asks is told."""
    steps: int
    fitted: dict[tuple[Key, ...], "Ensemble"] = field(default_factory=dict)
    """By what it was trained on: ways that have asked the same so far need it once."""

    def ensemble(self, asked: Sequence[Key]) -> "Ensemble":
        if tuple(asked) not in self.fitted:
            features = np.array([self.rounds[number][index] for number, index in asked])
            ranks = [self.ranks[key] for key in asked]
            self.fitted[tuple(asked)] = fit(features, ranks, self.seed, self.steps)
        return self.fitted[tuple(asked)]


@dataclass(frozen=True)
class Course:
    accuracies: list[float]
    """%, at the start and after each round."""
    gave_up: int | None
    """Round from which on it drew at random; None: never."""


class Ensemble(nn.Module):
    """Networks side by side."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(MEMBERS, *shape, generator=generator) - 1) / inputs**0.5)

        self.inner = drawn(WIDTH, HIDDEN, inputs=WIDTH)
        self.bias = drawn(1, HIDDEN, inputs=WIDTH)
        self.outer = drawn(HIDDEN, 1, inputs=HIDDEN)

    def hidden(self, features: Tensor) -> Tensor:
        """[N, WIDTH] -> [M, N, HIDDEN]"""
        return torch.tanh(features @ self.inner + self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[N, WIDTH] -> [M, N]"""
        return (self.hidden(features) @ self.outer)[..., 0]

    @torch.no_grad()
    def scores(self, features: Floats) -> Floats:
        """[P, K, WIDTH] -> [P, K, M]"""
        flat = torch.tensor(features.reshape(-1, WIDTH), dtype=torch.float32)
        return self(flat).T.double().numpy().reshape(*features.shape[:2], MEMBERS)  # type: ignore[no-any-return]


def measure(options: Options) -> Measured:
    seeds, each, steps = options.size(10, 2), options.size(40, 10), options.size(STEPS, 10)
    figures: list[Figure] = []
    checks: dict[str, dict[str, float]] = {}
    for prefix, uneven in WORLDS.items():
        say(f"  {prefix or 'all prompts alike: '}{seeds} seeds")
        courses = by_seed(partial(_courses, each, steps, uneven), seeds, options)
        found = {way: [one[way] for one in courses] for way in WAYS}
        more, intervals = _figures(prefix, found)
        figures, checks = figures + more, checks | intervals
    setup: dict[str, float] = {"seeds": seeds, "labels": each * (1 + ROUNDS), "rounds": ROUNDS}
    setup |= {"candidates": CANDIDATES, "random_share": RANDOM_SHARE, "members": MEMBERS, "completions": COMPLETIONS}
    return Measured(figures, setup, THREADS, checks)


def _courses(each: int, steps: int, uneven: float, seed: int) -> dict[str, Course]:
    """Of every way."""
    world = make(seed, each, steps, uneven)
    return {way: course(world, way, each) for way in WAYS}


def make(seed: int, each: int, steps: int, uneven: float) -> World:
    rng = np.random.default_rng([seed, 0])
    own = taste(rng)
    test = completions(1000, rng, uneven)
    sizes = [each] + ROUNDS * [CANDIDATES * each]
    rounds = [completions(size, rng, uneven) for size in sizes]
    annotator, ranks = Annotator("honest", NOISE), {}
    for number, features in enumerate(rounds):
        for index, utilities in enumerate(own(features)):
            shown = Shown(utilities, [str(k) for k in range(COMPLETIONS)], range(COMPLETIONS))
            ranks[number, index] = ranks_of(annotator.sees(shown, rng), 0.0)
    return World(seed, rounds, test, own(test), ranks, steps)


def course(world: World, way: str, each: int) -> Course:
    """`each` more labels in every round, chosen that way."""
    asked: list[Key] = [(0, index) for index in range(each)]
    kept_out: list[Key] = []
    gains: list[float] = []
    gave_up, accuracies = None, []
    for number in range(1, ROUNDS + 1):
        ensemble = world.ensemble(asked)
        accuracies.append(_accuracy(ensemble, world))
        if way == FALLING_BACK and gave_up is None and is_given_up(gains):
            gave_up = number
        worth = None if way == RANDOM or gave_up else _worth(way)(ensemble.scores(world.rounds[number]))
        chosen = choose(worth, CANDIDATES * each, each, RANDOM_SHARE, world.seed * 1000 + number)
        heldout, others = ([(number, one.index) for one in chosen if one.heldout is kind] for kind in (True, False))
        if worth is not None:
            gains += _gain(world, ensemble, others, heldout)
        asked, kept_out = [*asked, *kept_out, *others], heldout
    return Course([*accuracies, _accuracy(world.ensemble(asked), world)], gave_up)


def fit(features: Floats, ranks: Sequence[Sequence[int]], seed: int, steps: int) -> Ensemble:
    """
    Args:
        features: [R, COMPLETIONS, WIDTH]
    """
    ensemble, loss = Ensemble(seed), RankingLoss("plackett-luce")
    flat = torch.tensor(features.reshape(-1, WIDTH), dtype=torch.float32)
    rows = [
        Ranking(range(row * COMPLETIONS, (row + 1) * COMPLETIONS), own, prompt=row) for row, own in enumerate(ranks)
    ]
    rankings, draws = rankings_of(rows), _draws(len(ranks), seed)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        total = (loss(rankings.utilities(ensemble(flat)), rankings) * draws).sum() / len(ranks)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return ensemble


def logit_variance(scores: Floats) -> Floats:
    """[P, K, M] -> [P]: mean over pairs."""
    i, j = np.triu_indices(scores.shape[1], 1)
    return np.asarray((scores[:, i] - scores[:, j]).var(-1).mean(-1))


def _worth(way: str) -> Worth:
    return logit_variance if way == LOGITS else lambda scores: bald(list(scores), 1.0)


def _draws(prompts: int, seed: int) -> Tensor:
    """[M, prompts]: as `Numbering` draws them."""
    drawn = [np.random.default_rng([seed, member]).integers(prompts, size=prompts) for member in range(MEMBERS)]
    return torch.tensor(np.array([np.bincount(each, minlength=prompts) for each in drawn]), dtype=torch.float32)


def _accuracy(ensemble: Ensemble, world: World) -> float:
    return 100 * accuracy(ensemble.scores(world.test).mean(-1), world.utilities)


@torch.no_grad()
def _gain(world: World, ensemble: Ensemble, active: Sequence[Key], heldout: Sequence[Key]) -> list[float]:
    """What the active labels were worth more than random ones, by the first member as the product reads it."""
    judgments = {key: _judgment(key, world.ranks[key]) for key in (*active, *heldout)}
    features = {
        (one.prompt, text): hidden
        for key, one in judgments.items()
        for text, hidden in zip(one.texts, _hidden(ensemble, world.rounds[key[0]][key[1]]), strict=True)
    }
    head = ensemble.outer[0, :, 0].double().numpy()
    gain = worth_of_active([judgments[key] for key in active], [judgments[key] for key in heldout], features, head)
    return [] if gain is None else [gain.value]


def _hidden(ensemble: Ensemble, features: Floats) -> NDArray[np.float64]:
    return ensemble.hidden(torch.tensor(features, dtype=torch.float32))[0].double().numpy()


def _judgment(key: Key, ranks: tuple[int, ...]) -> Judgment:
    name = f"{key[0]}/{key[1]}"
    shown = tuple(CompletionShown(str(k)) for k in range(len(ranks)))
    return Judgment(
        judgment_id=name, task_id=name, prompt=name, completions=shown, ranks=ranks, annotator="honest", source="active"
    )


def _figures(prefix: str, found: dict[str, list[Course]]) -> tuple[list[Figure], dict[str, dict[str, float]]]:
    curves = {way: np.array([one.accuracies for one in courses]) for way, courses in found.items()}
    fewer, figures = round(FEWER * (ROUNDS + 1)) - 1, []
    for way in WAYS:
        figures += [Figure(f"{prefix}{way}: all labels", "%", curves[way][:, -1].tolist())]
        figures += [Figure(f"{prefix}{way}: 70 % of the labels", "%", curves[way][:, fewer].tolist())]
    for way in WAYS[1:]:
        less = curves[way][:, fewer] - curves[RANDOM][:, -1]
        figures += [Figure(f"{prefix}{way}: 70 % of the labels, less at random with all", "points", less.tolist())]
        above = (curves[way] - curves[RANDOM])[:, 1:].mean(1)
        bound = NO_WORSE if way == FALLING_BACK else None
        name = f"{prefix}{way}: above random with as many labels, mean of rounds"
        figures += [Figure(name, "points", above.tolist(), at_least=bound, headline=bound is not None)]
    checks = {figure.name: interval(list(figure.values)) for figure in figures}
    engaged = [one.gave_up for one in found[FALLING_BACK]]
    share_engaged = 100 * float(np.mean([number is not None for number in engaged]))
    for way in WAYS[1:]:
        name, share = f"{prefix}{way}: labels for random's accuracy", shares(curves[way], curves[RANDOM])
        # Active choice is to save labels, or else to be given up.
        bound = 100 * FEWER if way == FALLING_BACK and share_engaged < 100 else None
        figures += [Figure(name, "%", [share["mean"]], at_most=bound, headline=way == FALLING_BACK)]
        checks[name] = share
    figures += [Figure(f"{prefix}fall-back engaged, of the seeds", "%", [share_engaged], headline=True)]
    checks[f"{prefix}round in which the fall-back engaged, by seed; 0: never"] = _numbered(n or 0 for n in engaged)
    checks |= {f"{prefix}{way}: mean curve": _numbered(curves[way].mean(0).tolist()) for way in WAYS}
    return figures, checks


def _numbered(values: Iterable[float]) -> dict[str, float]:
    return {str(number): value for number, value in enumerate(values)}


def shares(active: Floats, at_random: Floats) -> dict[str, float]:
    """% of the labels with which the mean of the active curves first is at the last of the random ones, with a
    bootstrap interval over seeds; 100 where it is never.

    Args:
        active, at_random: [seeds, rounds + 1]
    """
    rng, rows = np.random.default_rng(0), len(active)
    found = [
        _share(active[some].mean(0), at_random[some].mean(0)) for some in rng.integers(rows, size=(RESAMPLED, rows))
    ]
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return {"mean": _share(active.mean(0), at_random.mean(0)), "low": low, "high": high}


def _share(active: Floats, at_random: Floats) -> float:
    reached = np.flatnonzero(active >= at_random[-1])
    if not len(reached):
        return 100.0
    first = int(reached[0])
    part = 0.0 if first == 0 else (at_random[-1] - active[first - 1]) / (active[first] - active[first - 1]) - 1
    return float(100 * (first + 1 + part) / len(active))


if __name__ == "__main__":
    main("feedback-selection", "Does asking what the members disagree about save labels?", measure)
