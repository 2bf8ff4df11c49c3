"""The annotators behind some judgments: how reliable each is, and whose tastes are alike."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import DataError
from rlhf.feedback.judgments import GOLD_RANKS, Judgment
from rlhf.preference.reliability import BAD, Evidence

Floats = NDArray[np.float64]
_ROUNDS = 50


def evidence_of(judgments: Sequence[Judgment], scores: Sequence[Floats]) -> dict[str, Evidence]:
    """By annotator.

    A judgment of source `gold` counts as gold by its metadata's `gold_ranks`; one of source `repeat` is compared with
    the same annotator's earlier one of the same completions, in whatever order either has them.

    Args:
        scores: [K] of each judgment, of the reward model.

    Raises:
        DataError: a gold judgment does not say what is right.
    """
    found: dict[str, Evidence] = defaultdict(Evidence)
    seen: dict[tuple[str, str, frozenset[str]], dict[str, float]] = {}
    for judgment, own_scores in zip(judgments, scores, strict=True):
        evidence, liked = found[judgment.annotator], [-float(rank) for rank in judgment.ranks]
        evidence.fit.add(liked, own_scores.tolist())
        if judgment.source == "gold":
            evidence.gold.add(liked, gold_of(judgment))
        place = (judgment.annotator, judgment.prompt, frozenset(judgment.texts))
        if judgment.source == "repeat" and place in seen:
            evidence.repeats.add(liked, [seen[place][text] for text in judgment.texts])
        seen.setdefault(place, dict(zip(judgment.texts, liked, strict=True)))
    return dict(sorted(found.items()))


def gold_of(judgment: Judgment) -> list[float]:
    """[K], higher is better."""
    try:
        ranks = [-float(rank) for rank in json.loads(judgment.metadata[GOLD_RANKS])]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'judgment {judgment.judgment_id} has source "gold", but no {GOLD_RANKS} such as "[1, 2]" in its metadata'
        ) from error
    if len(ranks) != len(judgment.ranks):
        raise DataError(
            f"judgment {judgment.judgment_id}: {len(ranks)} {GOLD_RANKS} for {len(judgment.ranks)} completions"
        )
    return ranks


@dataclass(frozen=True)
class Groups:
    """People of like taste."""

    of: dict[str, int]
    """By annotator; those left out have none."""
    centres: Floats
    """[G, rank]"""
    shares: Floats
    """[G], of the people; they add up to 1."""

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"share": float(share), "annotators": [name for name, own in self.of.items() if own == group]}
            for group, share in enumerate(self.shares)
        ]


def groups_of(
    tastes: Floats,
    spread: Floats,
    honesty: Floats,
    names: Sequence[str],
    verdicts: Mapping[str, str],
    at_most: int,
) -> Groups:
    """k-means, weighted by honesty; whoever is known to be random or adversarial is left out.

    Two tastes are as far apart as the rewards are that they give: |u_a - u_b| in the metric of g's covariance.

    Args:
        tastes: [A, rank], u.
        spread: [rank, rank], covariance of g over completions.
        honesty: [A], 0 to 1.
        names: [A]
    """
    kept = [number for number, name in enumerate(names) if verdicts.get(name) not in BAD] or list(range(len(names)))
    points, weights = tastes[kept] @ _root(spread), np.maximum(honesty[kept], 1e-3)
    assigned = _k_means(points, weights, min(at_most, len(np.unique(points, axis=0))))
    used = np.unique(assigned)
    centres = [
        np.average(tastes[kept][assigned == group], axis=0, weights=weights[assigned == group]) for group in used
    ]
    totals = np.array([weights[assigned == group].sum() for group in used])
    numbers = np.searchsorted(used, assigned).tolist()
    return Groups(
        {names[a]: number for a, number in zip(kept, numbers, strict=True)}, np.array(centres), totals / totals.sum()
    )


def _root(spread: Floats) -> Floats:
    values, vectors = np.linalg.eigh(spread)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)), dtype=np.float64)


def _k_means(points: Floats, weights: Floats, count: int) -> NDArray[np.int64]:
    """[A]: Lloyd's steps from centres that lie furthest apart, so that nothing is drawn."""
    mean = np.average(points, axis=0, weights=weights)
    centres = [points[np.argmax(weights * ((points - mean) ** 2).sum(1))]]
    while len(centres) < count:
        nearest = np.min([((points - centre) ** 2).sum(1) for centre in centres], axis=0)
        centres.append(points[np.argmax(weights * nearest)])
    assigned = np.zeros(len(points), dtype=np.int64)
    for _ in range(_ROUNDS):
        assigned = np.argmin([((points - centre) ** 2).sum(1) for centre in centres], axis=0)
        for group in np.unique(assigned).tolist():
            inside = assigned == group
            centres[group] = np.average(points[inside], axis=0, weights=weights[inside])
    return assigned
