"""The judge: what progress is measured by. It shares no data with the annotators and the reward model.

Either a classifier of words and word pairs, fitted from labelled texts when evaluation starts, or a person's own rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlhf.data.rows import is_data_file
from rlhf.data.sentiment import SentimentClassifier
from rlhf.reward.rules import Rule, ScoreItem, load_rule

Scores = NDArray[np.float64]


class Judge(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def heldout_accuracy(self) -> float | None:
        """On labelled texts that it was not fitted from; None: it was not fitted."""

    def judge(self, items: Sequence[ScoreItem]) -> Scores:
        """[N], higher is better."""


@dataclass(frozen=True)
class ClassifierJudge:
    """Probability that a text is positive."""

    name: str
    classifier: SentimentClassifier

    @property
    def heldout_accuracy(self) -> float:
        return self.classifier.heldout_accuracy

    def judge(self, items: Sequence[ScoreItem]) -> Scores:
        """Of prompt and completion together, as the labelled texts are whole ones."""
        return self.classifier.probabilities([item.prompt + item.completion for item in items])


@dataclass(frozen=True)
class RuleJudge:
    """A rule with a reward rule's signature."""

    rule: Rule
    heldout_accuracy: None = None

    @property
    def name(self) -> str:
        return self.rule.name

    def judge(self, items: Sequence[ScoreItem]) -> Scores:
        return self.rule.score(items).astype(np.float64)


def load_judge(source: str | Path, seed: int) -> Judge:
    """A classifier fitted from a data file, or the rule of that name.

    Raises:
        DataError, RuleError: see `SentimentClassifier.fit` and `load_rule`.
    """
    if is_data_file(source):
        return ClassifierJudge(str(source), SentimentClassifier.fit(source, seed))
    return RuleJudge(load_rule(str(source)))
