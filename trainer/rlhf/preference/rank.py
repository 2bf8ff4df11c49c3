"""`rlhf rank`: simulated annotators rank sampled completions. For people there is the annotation page instead."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.samples import Sampled, read_samples
from rlhf.errors import DataError
from rlhf.feedback.judgments import CompletionShown, Judgment, write_judgments
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
    judgments = list(judge_all(samples, utilities, annotators_of(rank, differences), rank, minority))
    out = rank.out or paths.comparisons
    write_judgments(out, judgments)
    _log.info("wrote %d judgments to %s", len(judgments), out)
    _rank_heldout(paths, utility)
    return figures(judgments, samples, utilities)


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
