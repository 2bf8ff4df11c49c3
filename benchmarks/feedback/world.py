"""People who rank completions, and a small neural reward model that learns from them.

A completion is 24 numbers. Tastes are random functions of them, half linear and half through eight tanh units; a
minority has a taste drawn by itself. The reward model is a network of one hidden layer, 48 wide, over the same numbers,
trained on all rankings at once; losses, models of annotators, simulated annotators and evidence are the product's own.
`sentences` puts real sentences in place of the numbers, and a linear head in place of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf.preference.annotators import Annotator, Shown, ranks_of
from rlhf.preference.crowd import Annotators
from rlhf.preference.loss import RankingLoss
from rlhf.preference.rankings import Ranking, Rankings, rankings_of
from rlhf.preference.reliability import Evidence

Floats = NDArray[np.float64]
WIDTH, COMPLETIONS, HIDDEN = 24, 4, 48
NOISE = 0.45
"""Of every annotator: an honest one orders four pairs in five as its own taste does, as people do."""
LR, DECAY, STEPS = 0.01, 6.0, 200
"""Chosen by the accuracy of plain Bradley-Terry on all-clean labels; the same for every way."""
RANK, RIDGE = 2, 0.3
"""The defaults of the settings."""
GOLD, REPEATS = 4, 4
"""Rankings beside the others: of easy completions that any taste would rank alike, and of some seen before."""


@dataclass(frozen=True)
class Training:
    """The same for every way."""

    hidden: int = HIDDEN
    """Units between features and reward; 0: a linear head."""
    lr: float = LR
    decay: float = DECAY
    steps: int = STEPS


@dataclass(frozen=True)
class World:
    features: Tensor
    """[completions, WIDTH] float32"""
    rankings: Rankings
    evidence: list[Evidence]
    """By annotator; gold and repeats alone."""
    kinds: tuple[str, ...]
    test: Tensor
    """[prompts, COMPLETIONS, WIDTH] float32"""
    majority: Floats
    """[prompts, COMPLETIONS], true utilities of the test completions."""
    minority: Floats

    def those(self, *kinds: str) -> NDArray[np.bool_]:
        return np.isin(self.kinds, kinds)


@dataclass(frozen=True)
class Learnt:
    rewards: Floats
    """[prompts, COMPLETIONS] of the test completions, r_0."""
    own: Floats
    """[A, prompts, COMPLETIONS]: r_k; r_0 for all where tastes are not modelled."""
    honest: Floats
    """[A], the fitted share of honest judging; 1 where that is not modelled."""
    on_rankings: Floats
    """[R, COMPLETIONS], r_0 of what was ranked."""


def make(kinds: Sequence[str], per: int, prompts: int, seed: int) -> World:
    """For one seed the prompts, tastes and who ranks what are the same whatever the kinds are."""
    rng = np.random.default_rng([seed, 0])
    features, test = completions(prompts, rng), completions(500, rng)
    tastes = [taste(rng) for _ in range(2)]
    return judged(
        kinds, [NOISE], per, features, [own(features) for own in tastes], test, [o(test) for o in tastes], seed
    )


def judged(
    kinds: Sequence[str],
    noises: Sequence[float],
    per: int,
    features: Floats,
    true: Sequence[Floats],
    test: Floats,
    true_test: Sequence[Floats],
    seed: int,
) -> World:
    """Every annotator ranks `per` prompts.

    Args:
        noises: of the annotators, in turn.
        features, test: [prompts, COMPLETIONS, width]
        true, true_test: [prompts, COMPLETIONS], by the shared taste and by the minority's.
    """
    evidence: list[Evidence] = [Evidence() for _ in kinds]
    rankings: list[Ranking] = []
    easy = 3 * float(np.mean(noises)) * np.arange(COMPLETIONS, dtype=np.float64)
    for number, kind in enumerate(kinds):
        own = np.random.default_rng([seed, 1, number])
        annotator = Annotator(f"a{number}", noises[number % len(noises)], kind)
        chosen = own.choice(len(features), per, replace=False).tolist()
        for prompt in chosen:
            order = tuple(own.permutation(COMPLETIONS).tolist())
            ranks = _ranks(annotator, true[0][prompt], true[1][prompt], order, own)
            items = range(prompt * COMPLETIONS, (prompt + 1) * COMPLETIONS)
            rankings.append(Ranking(items, ranks, number, order, prompt=prompt))
        _ask_again(annotator, chosen[:REPEATS], true, easy, rankings[-per:], evidence[number], own)
    flat = torch.tensor(features.reshape(-1, features.shape[-1]), dtype=torch.float32)
    tested = torch.tensor(test, dtype=torch.float32)
    return World(flat, rankings_of(rankings), evidence, tuple(kinds), tested, true_test[0], true_test[1])


def learn(world: World, loss: str, annotators: str, seed: int, training: Training) -> Learnt:
    """
    Args:
        annotators: as the setting: "none", "reliability" or "groups".
    """
    torch.manual_seed(seed)
    count, rank = len(world.kinds), RANK if annotators == "groups" else 0
    network = _network(world.features.shape[-1], training.hidden, 1 + rank)
    people = Annotators(count, reliability=annotators != "none", rank=rank, ridge=RIDGE, lr=training.lr, seed=seed)
    _train(network, people, RankingLoss(loss), world, training)  # type: ignore[arg-type]
    with torch.no_grad():
        test, ranked = network(world.test), network(world.features)[:, 0]
        own = test[..., 0].expand(count, -1, -1)
        if rank:
            own = own + torch.einsum("pkd,ad->apk", test[..., 1:], people.tastes)
        honest = people.log_shares[:, 0].exp() if annotators != "none" else torch.ones(count)
        scores = world.rankings.utilities(ranked)
    return Learnt(*(each.double().numpy() for each in (test[..., 0], own, honest, scores)))


def accuracy(rewards: Floats, utilities: Floats) -> float:
    """Share of the pairs of a prompt that the rewards order as the true utilities do."""
    wanted = utilities[:, :, None] - utilities[:, None, :]
    found = rewards[:, :, None] - rewards[:, None, :]
    return float((found[wanted > 0] > 0).mean())


def own_accuracies(world: World, learnt: Learnt) -> dict[str, float]:
    """%: how far each annotator's own reward orders as its own taste does, a mean over the people of either side."""
    sides = {"majority": ("honest", world.majority), "minority": ("minority", world.minority)}
    return {
        side: 100 * float(np.mean([accuracy(rewards, true) for rewards in learnt.own[world.those(kind)]]))
        for side, (kind, true) in sides.items()
    }


def auc(goodness: Floats, bad_mask: NDArray[np.bool_]) -> float:
    """Probability that a bad annotator has less of it than an honest one."""
    bad, good = goodness[bad_mask][:, None], goodness[~bad_mask][None, :]
    return float(np.mean((bad < good) + 0.5 * (bad == good)))


def verdicts(world: World, learnt: Learnt) -> list[str]:
    """Of every annotator, from its fit, gold and repeats."""
    found = []
    for number, evidence in enumerate(world.evidence):
        whole = Evidence(gold=evidence.gold, repeats=evidence.repeats)
        for row in torch.nonzero(world.rankings.annotators == number).flatten().tolist():
            liked = (-world.rankings.ranks[row].double()).tolist()
            whole.fit.add(liked, learnt.on_rankings[row].tolist())
        found.append(whole.verdict())
    return found


def _network(width: int, hidden: int, outputs: int) -> nn.Module:
    if not hidden:
        return nn.Linear(width, outputs, bias=False)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, outputs, bias=False))


def _train(network: nn.Module, people: Annotators, loss: RankingLoss, world: World, training: Training) -> None:
    groups = [
        {"params": list(network.parameters()), "weight_decay": training.decay},
        {"params": [*people.parameters(), *loss.parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=training.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    for _ in range(training.steps):
        values = network(world.features)
        tastes = values[:, 1:][world.rankings.items] if people.rank else None
        nll = people(loss, world.rankings.utilities(values[:, 0]), tastes, world.rankings)
        total = (nll.sum() + people.penalty()) / len(world.rankings)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()


def completions(prompts: int, rng: np.random.Generator, uneven: float = 0.0) -> Floats:
    """[prompts, COMPLETIONS, WIDTH]: those of one prompt have something in common.

    Args:
        uneven: standard deviation of the logarithm of how far they differ; above 0, those of some prompts are nearly
            alike, as a policy's are.
    """
    own = 0.9 * rng.normal(size=(prompts, COMPLETIONS, WIDTH))
    common = 0.44 * rng.normal(size=(prompts, 1, WIDTH))
    if uneven:
        own *= np.exp(uneven * rng.normal(size=(prompts, 1, 1)))
    return np.asarray(own + common, dtype=np.float64)


def taste(rng: np.random.Generator) -> Callable[[Floats], Floats]:
    """Utilities of completions, mean 0 and standard deviation 1."""
    linear, inner, outer = rng.normal(size=WIDTH), rng.normal(size=(8, WIDTH)), rng.normal(size=8)

    def raw(x: Floats) -> Floats:
        return np.asarray(x @ linear / np.sqrt(WIDTH) + np.tanh(2 * x @ inner.T / np.sqrt(WIDTH)) @ outer / np.sqrt(8))

    some = raw(rng.normal(size=(4000, WIDTH)))
    return lambda x: np.asarray((raw(x) - some.mean()) / some.std())


def _ranks(
    annotator: Annotator, shared: Floats, minority: Floats, order: Sequence[int], rng: np.random.Generator
) -> tuple[int, ...]:
    texts = [str(k) for k in range(len(shared))]
    return ranks_of(annotator.sees(Shown(shared, texts, order, minority), rng), 0.0)


def _ask_again(
    annotator: Annotator,
    prompts: Sequence[int],
    true: Sequence[Floats],
    easy: Floats,
    rankings: Sequence[Ranking],
    evidence: Evidence,
    rng: np.random.Generator,
) -> None:
    """Gold: three steps of the noise apart, and the same for any taste. Repeats: as before, in another order."""
    for _ in range(GOLD):
        order = tuple(rng.permutation(COMPLETIONS).tolist())
        evidence.gold.add([-rank for rank in _ranks(annotator, easy, easy, order, rng)], easy.tolist())
    for prompt, before in zip(prompts, rankings, strict=False):
        order = tuple(rng.permutation(COMPLETIONS).tolist())
        again = _ranks(annotator, true[0][prompt], true[1][prompt], order, rng)
        evidence.repeats.add([-rank for rank in again], [-rank for rank in before.ranks])
