"""`rlhf rank`: simulated annotators rank sampled completions. For people there is the annotation page instead."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.samples import Sampled, read_samples
from rlhf.errors import DataError
from rlhf.feedback.judgments import GOLD_RANKS, CompletionShown, Judgment, write_judgments
from rlhf.preference.annotators import Annotator, Shown, Utilities, noise_scale_for, pair_differences, ranks_of
from rlhf.preference.settings import RankSettings
from rlhf.preference.utility import Utility, load_utility
from rlhf.reward.rules import ScoreItem
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings

_log = logging.getLogger(__name__)


NOISE_FREE = Annotator("noise-free", 0.0)


def run(settings: Settings) -> Mapping[str, Any]:
    """Ranks every prompt's completions, writes the judgments and returns their figures.

    Completions of held-out prompts are ranked without noise, to a file of their own.

    Raises:
        DataError: no samples, a prompt with a single completion, or completions that the utility cannot tell apart.
        RuleError: the utility cannot be loaded, or answers nonsense.
    """
    rank, paths = settings.rank, settings.paths
    source = rank.samples or paths.samples
    utility = load_utility(rank.utility or paths.annotators_labelled, rank.seed)
    samples, utilities = _seen(source, utility)
    differences = pair_differences(utilities)
    minority = utilities_of(load_utility(rank.minority_utility, rank.seed), samples) if rank.minority_utility else None
    annotators = annotators_of(rank, differences)
    judgments = list(judge_all(samples, utilities, annotators, rank, minority))
    checks = list(gold_and_repeats(judgments, samples, utilities, annotators, rank, minority))
    out = rank.out or paths.comparisons
    write_judgments(out, [*judgments, *checks])
    _log.info("wrote %d judgments to %s", len(judgments) + len(checks), out)
    _rank_heldout(paths, utility)
    asked = Counter({"gold": "gold_judgments", "repeat": "repeat_judgments"}[each.source] for each in checks)
    return figures(judgments, samples, utilities) | dict(asked)


def annotators_of(rank: RankSettings, differences: NDArray[np.float64]) -> list[Annotator]:
    """
    Args:
        differences: of the utilities of pairs, as `pair_differences` gives them.
    """
    typical, kinds = float(np.mean(differences)), rank.kinds or ("honest",) * len(rank.reliabilities)
    return [
        Annotator(f"simulated-{number}", noise_scale_for(reliability, differences), kind, typical, rank.trigger)
        for number, (reliability, kind) in enumerate(zip(rank.reliabilities, kinds, strict=True))
    ]


def _rank_heldout(paths: RunPaths, utility: Utility) -> None:
    paths.heldout_comparisons.unlink(missing_ok=True)
    if paths.heldout_samples.exists():
        samples, utilities = _seen(paths.heldout_samples, utility)
        rng = np.random.default_rng(0)
        judgments = [_judge(s, true, NOISE_FREE, 0.0, rng) for s, true in zip(samples, utilities, strict=True)]
        write_judgments(paths.heldout_comparisons, judgments)


def _seen(source: str | Path, utility: Utility) -> tuple[list[Sampled], list[Utilities]]:
    """Samples that can be ranked, and the utilities of their completions, [K] per prompt.

    Raises:
        DataError: they cannot.
    """
    samples = read_samples(source)
    if any(len(sampled.completions) < 2 for sampled in samples):
        raise DataError(
            "has a prompt with a single completion, which cannot be ranked; sample two or more", path=source
        )
    utilities = utilities_of(utility, samples)
    if not len(pair_differences(utilities)):
        raise DataError("rank.utility gives all completions of each prompt the same utility", path=source)
    return samples, utilities


def utilities_of(utility: Utility, samples: Sequence[Sampled]) -> list[Utilities]:
    """[K] per prompt."""
    items = [
        ScoreItem(sampled.prompt, completion.text, completion.token_ids, sampled.metadata)
        for sampled in samples
        for completion in sampled.completions
    ]
    ends = np.cumsum([len(sampled.completions) for sampled in samples])
    return np.split(utility(items), ends[:-1])


def judge_all(
    samples: Sequence[Sampled],
    utilities: Sequence[Utilities],
    annotators: Sequence[Annotator],
    rank: RankSettings,
    minority: Sequence[Utilities] | None = None,
) -> Iterator[Judgment]:
    """
    Args:
        utilities, minority: [K] per prompt, of the shared taste and of the minority's.
    """
    rng = np.random.default_rng(rank.seed)
    for index, (sampled, true) in enumerate(zip(samples, utilities, strict=True)):
        drawn = rng.choice(len(annotators), size=rank.judgments_per_prompt, replace=False)
        for number in sorted(drawn):
            others = None if minority is None else minority[index]
            yield _judge(sampled, true, annotators[number], rank.tie_margin, rng, others)


def gold_and_repeats(
    judgments: Sequence[Judgment],
    samples: Sequence[Sampled],
    utilities: Sequence[Utilities],
    annotators: Sequence[Annotator],
    rank: RankSettings,
    minority: Sequence[Utilities] | None = None,
) -> Iterator[Judgment]:
    """What tells the careless from the dissenting: for each annotator the easiest pairs there are, with what is right,
    and some of its own rankings again.

    Args:
        judgments: the annotators' rankings of the samples.
        utilities, minority: [K] per prompt.
    """
    rng = np.random.default_rng((rank.seed, 1))
    easiest = _easiest_pairs(utilities, minority)
    others = [None] * len(samples) if minority is None else minority
    places = {str(sampled.prompt_index): place for place, sampled in enumerate(samples)}
    for annotator in annotators:
        own = [places[judgment.task_id] for judgment in judgments if judgment.annotator == annotator.name]
        for place, pair, ranks in easiest[: round(rank.gold_share * len(own))]:
            asked = _pair_of(samples[place], pair), utilities[place][list(pair)]
            judgment = _judge(*asked, annotator, rank.tie_margin, rng, _at(others[place], pair))
            yield replace(
                judgment,
                judgment_id=f"{judgment.judgment_id}/gold",
                task_id=f"{judgment.task_id}:gold",
                completions=tuple(_shown(samples[place])[index] for index in pair),
                metadata={**judgment.metadata, GOLD_RANKS: json.dumps(ranks)},
                source="gold",
            )
        for place in rng.choice(own, size=round(rank.repeat_share * len(own)), replace=False).tolist() if own else []:
            judgment = _judge(samples[place], utilities[place], annotator, rank.tie_margin, rng, others[place])
            yield replace(
                judgment,
                judgment_id=f"{judgment.judgment_id}/repeat",
                task_id=f"{judgment.task_id}:repeat:{annotator.name}",
                source="repeat",
            )


def figures(
    judgments: Sequence[Judgment], samples: Sequence[Sampled], utilities: Sequence[Utilities]
) -> dict[str, Any]:
    """Numbers of judgments and pairs, agreement between annotators, and each one's reliability as it came out.

    `agreement` is the share of the pairs that two annotators of a prompt both ordered and ordered alike; None where no
    prompt has two. `reliability` is the share of an annotator's ordered pairs that it ordered as the utility does.
    """
    utilities_at = {str(sampled.prompt_index): true for sampled, true in zip(samples, utilities, strict=True)}
    orders = [_orders(np.negative(judgment.ranks)) for judgment in judgments]
    right: dict[str, list[bool]] = defaultdict(list)
    of_prompt: dict[str, list[dict[tuple[int, int], bool]]] = defaultdict(list)
    for judgment, order in zip(judgments, orders, strict=True):
        right[judgment.annotator] += _alike(order, _orders(utilities_at[judgment.task_id]))
        of_prompt[judgment.task_id].append(order)
    both = [same for seen in of_prompt.values() for a, b in combinations(seen, 2) for same in _alike(a, b)]
    pairs = sum(len(judgment.ranks) * (len(judgment.ranks) - 1) // 2 for judgment in judgments)
    return {
        "judgments": len(judgments),
        "prompts": len(of_prompt),
        "pairs": pairs,
        "ties": pairs - sum(map(len, orders)),
        "agreement": float(np.mean(both)) if both else None,
        "reliability": {name: float(np.mean(seen)) for name, seen in sorted(right.items()) if seen},
    }


def _easiest_pairs(
    utilities: Sequence[Utilities], minority: Sequence[Utilities] | None
) -> list[tuple[int, tuple[int, int], list[int]]]:
    """Of each prompt the two completions that lie farthest apart for whoever sees them closest, and their right ranks;
    widest first. Prompts are left out where the tastes order every pair in opposite ways, or one of them none."""
    tastes = [taste for taste in (utilities, minority) if taste is not None]
    scales = [float(np.mean(apart)) if len(apart := pair_differences(taste)) else 1.0 for taste in tastes]
    found = []
    for place, own in enumerate(zip(*tastes, strict=True)):
        orders = permutations(range(len(own[0])), 2)
        gap, better, worse = max(
            (min((of[i] - of[j]) / scale for of, scale in zip(own, scales, strict=True)), i, j) for i, j in orders
        )
        if gap > 0:
            pair = (better, worse) if better < worse else (worse, better)
            found.append((-gap, place, pair, [1, 2] if better < worse else [2, 1]))
    return [(place, pair, ranks) for _, place, pair, ranks in sorted(found)]


def _pair_of(sampled: Sampled, pair: tuple[int, int]) -> Sampled:
    return replace(sampled, completions=tuple(sampled.completions[index] for index in pair))


def _at(utilities: Utilities | None, pair: tuple[int, int]) -> Utilities | None:
    return None if utilities is None else utilities[list(pair)]


def _judge(
    sampled: Sampled,
    utilities: Utilities,
    annotator: Annotator,
    tie_margin: float,
    rng: np.random.Generator,
    minority: Utilities | None = None,
) -> Judgment:
    texts = tuple(completion.text for completion in sampled.completions)
    order = tuple(rng.permutation(len(texts)).tolist())
    seen = annotator.sees(Shown(utilities, texts, order, minority), rng)
    return Judgment(
        judgment_id=f"{sampled.prompt_index}/{annotator.name}",
        task_id=str(sampled.prompt_index),
        prompt=sampled.prompt,
        metadata=sampled.metadata,
        completions=_shown(sampled),
        ranks=ranks_of(seen, tie_margin),
        order_shown=order,
        annotator=annotator.name,
        source="simulated",
    )


def _shown(sampled: Sampled) -> tuple[CompletionShown, ...]:
    """[K], each with the sampling settings that make it again, its own seed among them."""
    drawn = asdict(sampled.sampling)
    del drawn["completions"]
    return tuple(
        CompletionShown(
            each.text, f"{sampled.prompt_index}/{number}", str(sampled.version), drawn | {"seed": each.seed}
        )
        for number, each in enumerate(sampled.completions)
    )


def _orders(values: Sequence[float] | Utilities) -> dict[tuple[int, int], bool]:
    """Whether i is better than j, for all pairs i < j of different value."""
    pairs = combinations(range(len(values)), 2)
    return {(i, j): bool(values[i] > values[j]) for i, j in pairs if values[i] != values[j]}


def _alike(a: Mapping[tuple[int, int], bool], b: Mapping[tuple[int, int], bool]) -> list[bool]:
    return [a[pair] == b[pair] for pair in a.keys() & b.keys()]
