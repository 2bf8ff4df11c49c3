"""Do the same methods win on real sentences?

Annotators rank four sentences of films' reviews at a time. What most of them like is the log-odds of a classifier of
sentiment, fitted from one half of the labelled sentences; the minority likes plain words, the fewer letters the better.
The two hardly depend on each other. Twenty annotators order 90, 80 or 65 % of the pairs as their taste does, where six
of them do not turn their rankings over, click at random, or read half of what they rank and leave the rest as shown.

The reward model is the product's losses and models of annotators over a linear head, and what it reads is frozen: the
pretrained model's hidden states of every layer, each a mean over the sentence's tokens. (A reward model of the product
trains its trunk and reads the last token, which before training says little of sentiment.) Held-out sentences are of
the same reviews; beside them `people's labels` counts the pairs of a positive and a negative sentence, of the other
half of the labelled ones, that are ordered as people labelled them, which no simulated annotator has any part in.

    .venv/bin/python benchmarks/feedback/sentences.py --sentences FOLDER

FOLDER holds corpus.jsonl and labelled.jsonl, as for the run (`rlhf run configs/movie-reviews.toml --set
data.folder=FOLDER`) whose pretrained model is read; `--model` names another.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The folder of this file makes way: its modules are the package `feedback`.
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch

from feedback.intervals import interval
from feedback.seeds import THREADS, by_seed
from feedback.world import (
    COMPLETIONS,
    Floats,
    Training,
    World,
    accuracy,
    auc,
    judged,
    learn,
    own_accuracies,
    verdicts,
)
from harness.bench import Figure, Measured, Options, main, scratch
from harness.machine import ROOT
from rlhf.data.rows import read_rows, write_rows
from rlhf.data.sentiment import LABELS, read_labelled
from rlhf.models.causal import load_causal_lm
from rlhf.models.padding import pad
from rlhf.models.tokenizer import load_tokenizer, pad_token_id
from rlhf.preference.annotators import noise_scale_for, pair_differences
from rlhf.preference.reliability import BAD
from rlhf.preference.utility import load_utility
from rlhf.reward.rules import ScoreItem

PEOPLE, BAD_PEOPLE = 20, 6
RELIABILITIES = (0.9, 0.8, 0.65)
KINDS = ("adversarial", "random", "lazy")
COST_AT_MOST = {"adversarial": 1.0, "random": 1.5}
WORDS = (8, 24)
"""Of a sentence: longer ones take longer to read."""
AT_ONCE = 64
TRAINING = Training(hidden=0, lr=0.05, decay=1.0, steps=150)
"""Learning rate and decay by the accuracy of plain Plackett-Luce on all-clean labels."""
NAIVE, PLAIN, OURS, TASTES = "naive Bradley-Terry", "plain Plackett-Luce", "with reliability", "with tastes"
HOW = {
    NAIVE: ("all-pairs", "none"),
    PLAIN: ("plackett-luce", "none"),
    OURS: ("plackett-luce", "reliability"),
    TASTES: ("plackett-luce", "groups"),
}
CLEAN = f"{PLAIN}, all clean"
LABELLED = "people's labels"
STEPS = ((PLAIN, NAIVE), (OURS, PLAIN))
"""The better one first, by the order that the small world has."""


@dataclass(frozen=True)
class Sentences:
    """[prompts, COMPLETIONS, width] features, and utilities [2, prompts, COMPLETIONS] of both tastes."""

    features: Floats
    utilities: Floats
    labelled: Floats
    """[prompts, COMPLETIONS, width]: half of each prompt's sentences are positive."""
    labels: Floats
    """[prompts, COMPLETIONS], 1 and 0."""


def measure(options: Options) -> Measured:
    seeds, per = options.size(5, 2), options.size(200, 10)
    training, heldout = options.size(1000, 30), options.size(300, 10)
    read = read_sentences(options.paths["sentences"], options.paths["model"], training + heldout, heldout)
    ran = by_seed(partial(_one, read, training, per), seeds, options)
    found = {name: [one[name] for one in ran] for name in ran[0]}
    setup: dict[str, float] = {"seeds": seeds, "annotators": PEOPLE, "rankings_each": per, "prompts": training}
    setup |= {
        "heldout_prompts": heldout,
        "features": read.features.shape[-1],
        "correlation_of_tastes": _correlation(read),
    }
    intervals = {name: interval(values) for name, values in found.items()}
    return Measured([_figure(name, values) for name, values in found.items()], setup, THREADS, intervals)


def _one(read: Sentences, training: int, per: int, seed: int) -> dict[str, float]:
    drawn = np.random.default_rng([seed, 0]).permutation(len(read.features))
    shuffled = Sentences(read.features[drawn], read.utilities[:, drawn], read.labelled, read.labels)
    return {**_bad_annotators(shuffled, training, per, seed), **_minority(shuffled, training, per, seed)}


def read_sentences(folder: Path, model: Path, prompts: int, labelled: int) -> Sentences:
    """
    Raises:
        SystemExit: not enough sentences of the right length.
    """
    rng = np.random.default_rng(0)
    corpus = _drawn([row.text("text") for row in read_rows(folder / "corpus.jsonl")], prompts * COMPLETIONS, rng)
    rows = list(read_labelled(folder / "labelled.jsonl"))
    half = rng.permutation(len(rows))
    ours, others = ([rows[i] for i in some.tolist()] for some in np.array_split(half, 2))
    by_label = [
        _drawn([text for text, own in others if own == label], labelled * COMPLETIONS // 2, rng) for label in LABELS
    ]
    utilities = np.array([_sentiment(ours, corpus), [_plainness(text) for text in corpus]])
    features = _features([*corpus, *by_label[0], *by_label[1]], model)
    ends = np.cumsum([len(corpus), len(by_label[0])])
    own, negative, positive = np.split(features, ends)
    both = [part.reshape(labelled, COMPLETIONS // 2, -1) for part in (negative, positive)]
    labels = np.repeat([[0.0, 1.0]], COMPLETIONS // 2, axis=1)
    return Sentences(
        own.reshape(prompts, COMPLETIONS, -1),
        _standard(utilities).reshape(2, prompts, COMPLETIONS),
        np.concatenate(both, 1),
        np.tile(labels, (labelled, 1)),
    )


def _drawn(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    short = [text for text in texts if WORDS[0] <= len(text.split()) <= WORDS[1]]
    if len(short) < count:
        raise SystemExit(f"{count} sentences of {WORDS[0]} to {WORDS[1]} words are needed, but there are {len(short)}")
    return [short[i] for i in rng.permutation(len(short))[:count].tolist()]


def _sentiment(labelled: Sequence[tuple[str, str]], texts: Sequence[str]) -> Floats:
    with scratch() as folder:
        write_rows(folder / "labelled.jsonl", [{"text": text, "label": label} for text, label in labelled])
        utility = load_utility(folder / "labelled.jsonl", 0)
    return utility([ScoreItem("", text, (), {}) for text in texts])


def _plainness(text: str) -> float:
    return -float(np.mean([len(word) for word in text.split()]))


def _standard(values: Floats) -> Floats:
    return np.asarray((values - values.mean(-1, keepdims=True)) / values.std(-1, keepdims=True))


@torch.no_grad()
def _features(texts: Sequence[str], folder: Path) -> Floats:
    """[N, width], each of mean 0; their squares add up to 1 on average."""
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    ids = tokenizer(list(texts)).input_ids
    order, rows = np.argsort([len(own) for own in ids]).tolist(), []
    for start in range(0, len(order), AT_ONCE):
        input_ids, mask = pad([ids[i] for i in order[start : start + AT_ONCE]], pad_token_id(tokenizer))
        layers = model.base_model(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        counted = mask[..., None]
        rows.append(torch.cat([(own * counted).sum(1) / counted.sum(1) for own in layers], -1).double().numpy())
    found = np.concatenate(rows)[np.argsort(order)]
    return np.asarray(_standard(found.T).T / found.shape[1] ** 0.5)


def _correlation(read: Sentences) -> float:
    """Of two tastes of mean 0 and standard deviation 1."""
    return round(float(read.utilities.prod(0).mean()), 3)


def _world(read: Sentences, training: int, per: int, kinds: Sequence[str], seed: int) -> World:
    """The held-out prompts first in its test, then those that people labelled."""
    differences = pair_differences(list(read.utilities[0]))
    noises = [noise_scale_for(reliability, differences) for reliability in RELIABILITIES]
    test = np.concatenate([read.features[training:], read.labelled])
    true_test = [np.concatenate([own[training:], read.labels]) for own in read.utilities]
    true = list(read.utilities[:, :training])
    return judged(kinds, noises, per, read.features[:training], true, test, true_test, seed)


def _bad_annotators(read: Sentences, training: int, per: int, seed: int) -> dict[str, float]:
    heldout = len(read.features) - training
    clean = _world(read, training, per, ["honest"] * PEOPLE, seed)
    best = _accuracies(clean, PLAIN, heldout, seed)
    found = {CLEAN: best[0], f"{CLEAN}: {LABELLED}": best[1]}
    for kind in KINDS:
        world = _world(read, training, per, [kind] * BAD_PEOPLE + ["honest"] * (PEOPLE - BAD_PEOPLE), seed)
        label, own = f"30 % {kind}", {}
        for way in (NAIVE, PLAIN, OURS):
            own[way], labelled = _accuracies(world, way, heldout, seed)
            found |= {f"{label}: {way}": own[way], f"{label}: {way}: {LABELLED}": labelled}
        found |= {f"{label}: {more} above {less}": own[more] - own[less] for more, less in STEPS}
        found[f"{label}: cost {OURS}"] = best[0] - own[OURS]
        found[f"{label}: cost {NAIVE}"] = best[0] - own[NAIVE]
    return found


def _accuracies(world: World, way: str, heldout: int, seed: int) -> tuple[float, float]:
    """%, of held-out sentences by the shared taste, and by people's labels."""
    rewards = learn(world, *HOW[way], seed, TRAINING).rewards
    return (
        100 * accuracy(rewards[:heldout], world.majority[:heldout]),
        100 * accuracy(rewards[heldout:], world.majority[heldout:]),
    )


def _minority(read: Sentences, training: int, per: int, seed: int) -> dict[str, float]:
    without = Sentences(read.features, read.utilities, read.labelled[:0], read.labels[:0])
    world = _world(without, training, per, ["minority"] * 6 + ["random"] * 3 + ["honest"] * 11, seed)
    found: dict[str, float] = {}
    for way in (NAIVE, PLAIN, OURS, TASTES):
        learnt = learn(world, *HOW[way], seed, TRAINING)
        found |= {f"{side}: {way}": value for side, value in own_accuracies(world, learnt).items()}
        if way == OURS:
            found["AUC of random against the others"] = auc(learnt.honest, world.those("random"))
    called = np.array(verdicts(world, learnt))
    for kind in ("minority", "random", "honest"):
        found[f"{kind} called bad"] = 100 * float(np.isin(called[world.those(kind)], list(BAD)).mean())
    found[f"minority: {TASTES} above {OURS}"] = found[f"minority: {TASTES}"] - found[f"minority: {OURS}"]
    found["majority: loss by tastes"] = found[f"majority: {OURS}"] - found[f"majority: {TASTES}"]
    return found


def _figure(name: str, values: list[float]) -> Figure:
    points = "cost" in name or "loss" in name or "above" in name
    wanted: dict[str, float] = {}
    for kind, most in COST_AT_MOST.items():
        if name == f"30 % {kind}: cost {OURS}":
            wanted["at_most"] = most
    if "above" in name:
        wanted["at_least"] = 0.0
    wanted |= {"majority: loss by tastes": {"at_most": 3.0}, "minority called bad": {"at_most": 5.0}}.get(name, {})
    return Figure(name, "" if "AUC" in name else "points" if points else "%", values, headline=bool(wanted), **wanted)


if __name__ == "__main__":
    main(
        "feedback-sentences",
        "Do the same methods win on real sentences?",
        measure,
        paths={
            "sentences": ("folder of corpus.jsonl and labelled.jsonl", None),
            "model": ("pretrained model; of the movie reviews' run", ROOT / "runs" / "movie-reviews" / "pretrained"),
        },
    )
