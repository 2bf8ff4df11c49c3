"""Judgments as token sequences, split by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import DataError
from rlhf.feedback.judgments import Judgment
from rlhf.models.padding import pad
from rlhf.models.reward import ended
from rlhf.preference.rankings import Ranking, Rankings, rankings_of


@dataclass(frozen=True)
class Comparison:
    """One annotator's ranking of one prompt's completions."""

    prompt: str
    completions: tuple[str, ...]
    """[K]"""
    token_ids: tuple[list[int], ...]
    """[K], prompt and completion and one end token, as `rlhf.models.reward.ended` puts it."""
    judgment: Judgment
    """What it was made of: who ranked, when, in which order shown, whose completions."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """[K], 1 = best, equal = tie."""
        return self.judgment.ranks

    @cached_property
    def ordered(self) -> list[tuple[int, int]]:
        """(better, worse) of every pair that is no tie."""
        places = range(len(self.ranks))
        return [(i, j) for i in places for j in places if self.ranks[i] < self.ranks[j]]


@dataclass(frozen=True)
class ComparisonBatch:
    """The completions of some rankings, each scored once, however many annotators ranked them."""

    input_ids: Tensor
    """[N, T] int64"""
    attention_mask: Tensor
    """[N, T] bool"""
    rankings: Rankings
    draws: Tensor
    """[M, R] float32: how often each member has drawn the ranking's prompt; 1 where there is one member."""
    weight: float
    """Sum of K - 1 over the rankings."""

    def to(self, device: torch.device) -> ComparisonBatch:
        return ComparisonBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.rankings.to(device),
            self.draws.to(device),
            self.weight,
        )


@dataclass(frozen=True)
class Numbering:
    """Annotators and prompts by number, and which prompts each member of an ensemble has drawn."""

    annotators: dict[str, int]
    prompts: dict[str, int]
    draws: Tensor
    """[M, prompts] float32"""

    @classmethod
    def of(cls, comparisons: Sequence[Comparison], members: int, seed: int) -> Numbering:
        """With one member nothing is drawn: it reads every prompt once. Of several each draws as many prompts as there
        are, with replacement, as a bootstrap does; judgments of a prompt depend on each other and stay together."""
        annotators = sorted({each.judgment.annotator for each in comparisons})
        prompts = sorted({each.prompt for each in comparisons})
        draws = np.ones((members, len(prompts)))
        for member in range(members if members > 1 else 0):
            drawn = np.random.default_rng([seed, member]).integers(len(prompts), size=len(prompts))
            draws[member] = np.bincount(drawn, minlength=len(prompts))
        return cls(_numbered(annotators), _numbered(prompts), torch.tensor(draws, dtype=torch.float32))

    def member(self, number: int) -> Numbering:
        """For a member that is trained alone."""
        return Numbering(self.annotators, self.prompts, self.draws[number : number + 1])

    def ranking(self, comparison: Comparison, first: int) -> Ranking:
        """
        Args:
            first: number of its first completion.
        """
        judgment = comparison.judgment
        return Ranking(
            items=range(first, first + len(comparison.ranks)),
            ranks=comparison.ranks,
            annotator=self.annotators[judgment.annotator],
            order_shown=judgment.order_shown,
            strength=judgment.strength,
            prompt=self.prompts[comparison.prompt],
        )


def encode(
    judgments: Sequence[Judgment],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: Path,
    context_tokens: int | None = None,
) -> list[Comparison]:
    """Prompt and completion are encoded apart, as the reward service does.

    Args:
        max_length: tokens that a sequence may have, the end token included.
        context_tokens: of the reward model; None: it knows no limit.

    Raises:
        DataError: a completion is too long with its prompt; names file and row.
    """
    texts = {text for judgment in judgments for text in judgment.texts if text}
    prompts = {judgment.prompt for judgment in judgments}
    completion_ids = _encode_distinct(tokenizer, texts, special_tokens=False) | {"": []}
    prompt_ids = _encode_distinct(tokenizer, prompts, special_tokens=True)
    encoded = []
    for number, judgment in enumerate(judgments, start=1):
        start = prompt_ids[judgment.prompt]
        whole = [start + completion_ids[text] for text in judgment.texts]
        sequences = tuple(ended(ids, tokenizer.eos_token_id, context_tokens) for ids in whole)
        longest = max(map(len, sequences))
        if longest > max_length:
            raise DataError(
                f"prompt and completion of judgment {judgment.judgment_id} have {longest} tokens, but {max_length} are "
                "allowed (reward_model.max_length and the model's context)",
                path=source,
                line=number,
            )
        encoded.append(Comparison(judgment.prompt, judgment.texts, sequences, judgment))
    return encoded


def split_by_prompt(
    comparisons: Sequence[Comparison], heldout_fraction: float, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out comparisons; those of one prompt's text stay together.

    Raises:
        DataError: fewer than two prompts.
    """
    prompts = sorted({comparison.prompt for comparison in comparisons})
    if len(prompts) < 2:
        raise DataError("judgments of at least two prompts are needed, to train on one and test on the other")
    count = min(max(1, round(len(prompts) * heldout_fraction)), len(prompts) - 1)
    drawn = np.random.default_rng(seed).permutation(len(prompts))[:count]
    heldout = {prompts[index] for index in drawn.tolist()}
    return (
        [comparison for comparison in comparisons if comparison.prompt not in heldout],
        [comparison for comparison in comparisons if comparison.prompt in heldout],
    )


def by_completions(comparisons: Iterable[Comparison]) -> list[tuple[Comparison, ...]]:
    """Rankings of the same completions together, in order of first appearance: what is scored once for all of them."""
    groups: dict[tuple[tuple[int, ...], ...], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(tuple(map(tuple, comparison.token_ids)), []).append(comparison)
    return [tuple(group) for group in groups.values()]


def batch_of(groups: Sequence[Sequence[Comparison]], pad_id: int, numbering: Numbering) -> ComparisonBatch:
    """
    Args:
        groups: as `by_completions` makes them.
    """
    sequences = [sequence for group in groups for sequence in group[0].token_ids]
    starts = np.cumsum([0, *(len(group[0].token_ids) for group in groups)]).tolist()
    rankings = rankings_of(
        [numbering.ranking(one, start) for start, group in zip(starts, groups, strict=False) for one in group]
    )
    draws = numbering.draws[:, rankings.prompts]
    return ComparisonBatch(*pad(sequences, pad_id), rankings, draws, float(rankings.orders.sum()))


def margins_of(comparisons: Sequence[Comparison], values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Value of the better less that of the worse completion, for every ordered pair; `values` lie end to end."""
    offset, margins = 0, []
    for comparison in comparisons:
        margins += [values[offset + better] - values[offset + worse] for better, worse in comparison.ordered]
        offset += len(comparison.ranks)
    return np.array(margins, dtype=np.float64)


def sha256_of(comparisons: Iterable[Comparison]) -> str:
    digest = hashlib.sha256()
    for comparison in comparisons:
        digest.update(repr((comparison.token_ids, comparison.ranks)).encode())
    return digest.hexdigest()


def _encode_distinct(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, special_tokens: bool
) -> dict[str, list[int]]:
    ordered = sorted(texts)
    if not ordered:
        return {}
    ids = tokenizer(ordered, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False).input_ids
    return dict(zip(ordered, ids, strict=True))


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}
