"""How far annotators agree: Krippendorff's alpha, and the share of pairs that two of them order alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import combinations, permutations
from typing import Any, Literal

from rlhf.feedback.judgments import UNKNOWN_ANNOTATOR, Judgment

Level = Literal["nominal", "ordinal", "interval"]
Distance = Callable[[Any, Any], float]


def krippendorff_alpha(units: Iterable[Sequence[Hashable | None]], level: Level = "nominal") -> float | None:
    """Agreement beyond chance of any number of annotators, any of whom may have left units out.

    1 is perfect agreement, 0 that of chance, below 0 systematic disagreement.

    Args:
        units: the values that annotators gave to each unit; None, or nothing at all, where one gave none. Numbers for
            "ordinal" and "interval".

    Returns:
        None where it is not defined: no unit has two values, or all values are equal.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section E.
    """
    rated = [given for unit in units if len(given := [value for value in unit if value is not None]) > 1]
    counts = Counter(value for given in rated for value in given)
    distance = _distances(counts, level)
    total = sum(counts.values())
    observed = sum(_disagreement(Counter(given), distance) / (len(given) - 1) for given in rated)
    expected = _disagreement(counts, distance)
    return 1 - (total - 1) * observed / expected if expected else None


def pair_agreement_alpha(judgments: Iterable[Judgment]) -> float | None:
    """Krippendorff's alpha, ordinal, of first, tied or second over the pairs of completions.

    Every pair counts in both orders, so that it does not matter which of two happens to be listed first.
    """
    units = list(_votes(judgments))
    return krippendorff_alpha([*units, *([-vote for vote in unit] for unit in units)], "ordinal")


def pairwise_agreement(judgments: Iterable[Judgment]) -> float | None:
    """Share of the pairs that two annotators of the same completions both ordered, and ordered alike.

    None where no pair was ordered by two. Of an annotator who was asked twice the later answer counts; those without a
    name are taken for different people within one task, and not compared across tasks.
    """
    alike = [
        first == second for votes in _votes(judgments) for first, second in combinations(votes, 2) if first and second
    ]
    return sum(alike) / len(alike) if alike else None


def _votes(judgments: Iterable[Judgment]) -> Iterator[list[int]]:
    """For each two texts under one prompt, in sorted order, a 1 (the first is better), 0 or -1 of each annotator."""
    votes: dict[Hashable, dict[Hashable, int]] = defaultdict(dict)
    for number, judgment in enumerate(judgments):
        unnamed = judgment.annotator == UNKNOWN_ANNOTATOR
        who: Hashable = number if unnamed else judgment.annotator
        asked = judgment.task_id if unnamed else ""
        for first, second, vote in ordered_pairs(judgment):
            votes[judgment.prompt_id, asked, first, second][who] = vote
    return (list(of_pair.values()) for of_pair in votes.values())


def ordered_pairs(judgment: Judgment) -> Iterator[tuple[str, str, int]]:
    """Each two texts, in sorted order, with 1 if the first is better, 0 for a tie, -1 if the second is."""
    ranked = sorted(zip(judgment.texts, judgment.ranks, strict=True))
    for (first, a), (second, b) in combinations(ranked, 2):
        if first != second:
            yield first, second, (a < b) - (a > b)


def _disagreement(counts: Counter[Any], distance: Distance) -> float:
    """Sum of the distances over all ordered pairs of these values."""
    return sum(counts[a] * counts[b] * distance(a, b) for a, b in permutations(counts, 2))


def _distances(counts: Counter[Any], level: Level) -> Distance:
    """Squared distances between different values. Ordinal: the values that lie between, the two by half."""
    if level == "nominal":
        return lambda a, b: 1.0
    if level == "interval":
        return lambda a, b: float((a - b) ** 2)
    below, seen = {}, 0.0
    for value in sorted(counts):
        below[value] = seen + counts[value] / 2
        seen += counts[value]
    return lambda a, b: float((below[a] - below[b]) ** 2)
