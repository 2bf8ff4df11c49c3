"""The judge: what progress is measured by. It shares nothing with the annotators and the reward model.

Either a classifier of words and word pairs, fitted from labelled texts when evaluation starts, or a person's own rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]

from rlhf.data.rows import Row, read_rows
from rlhf.errors import DataError
from rlhf.reward.rules import Rule, ScoreItem, load_rule

LABELS = ("negative", "positive")
_HELDOUT_FRACTION = 0.2
_FEWEST = 10
_DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

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
    """Probability that a text is positive: logistic regression on counts of words and word pairs."""

    name: str
    pipeline: Any
    heldout_accuracy: float

    @classmethod
    def fit(cls, source: str | Path, seed: int) -> Self:
        """Fits on four fifths of the labelled rows; the rest gives `heldout_accuracy`.

        Raises:
            DataError: a row without `text` or a known `label`, or fewer than 10 rows of a label.
        """
        rows = list(read_rows(source))
        texts, labels = [row.text("text") for row in rows], [_label(row) for row in rows]
        for label, name in enumerate(LABELS):
            if labels.count(label) < _FEWEST:
                raise DataError(f"has {labels.count(label)} {name} texts; a judge needs {_FEWEST}", path=source)
        fit_texts, heldout_texts, fit_labels, heldout_labels = train_test_split(
            texts, labels, test_size=_HELDOUT_FRACTION, random_state=seed, stratify=labels
        )
        # One-letter words such as "I" count; scikit-learn's own pattern drops them.
        counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
        pipeline = make_pipeline(counts, LogisticRegression(max_iter=1000))
        pipeline.fit(fit_texts, fit_labels)
        return cls(str(source), pipeline, float(pipeline.score(heldout_texts, heldout_labels)))

    def score(self, texts: Sequence[str]) -> Scores:
        """P(positive), [N]."""
        probabilities: Scores = self.pipeline.predict_proba(list(texts))[:, 1]
        return probabilities

    def judge(self, items: Sequence[ScoreItem]) -> Scores:
        """Of prompt and completion together, as the labelled texts are whole ones."""
        return self.score([item.prompt + item.completion for item in items])


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
    """A classifier fitted from a data file, or the rule of that name."""
    if Path(source).exists() or str(source).endswith(_DATA_SUFFIXES):
        return ClassifierJudge.fit(source, seed)
    return RuleJudge(load_rule(str(source)))


def _label(row: Row) -> int:
    label = row.text("label")
    if label not in LABELS:
        raise row.error(f'field "label" must be "positive" or "negative", not {label!r:.40}')
    return LABELS.index(label)
