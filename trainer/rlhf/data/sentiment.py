"""A classifier of sentiment, fitted from labelled texts: what simulated annotators can go by, or a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]

from rlhf.data.rows import Row, read_rows
from rlhf.errors import DataError

LABELS = ("negative", "positive")
_HELDOUT_FRACTION = 0.2
_FEWEST = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SentimentClassifier:
    """Logistic regression on counts of words and word pairs."""

    pipeline: Any
    heldout_accuracy: float
    """On labelled texts that it was not fitted from."""

    @classmethod
    def fit(cls, source: str | Path, seed: int, inverse_penalty: float = 1.0) -> Self:
        """Fits on four fifths of the labelled rows; the rest gives `heldout_accuracy`.

        Args:
            inverse_penalty: scikit-learn's C. The smaller, the less a word counts that few texts have.

        Raises:
            DataError: a row without `text` or a known `label`, or fewer than 10 rows of a label.
        """
        rows = list(read_labelled(source))
        texts, labels = [text for text, _ in rows], [LABELS.index(label) for _, label in rows]
        for number, label in enumerate(LABELS):
            if labels.count(number) < _FEWEST:
                raise DataError(f"has {labels.count(number)} {label} texts; a classifier needs {_FEWEST}", path=source)
        fit_texts, heldout_texts, fit_labels, heldout_labels = train_test_split(
            texts, labels, test_size=_HELDOUT_FRACTION, random_state=seed, stratify=labels
        )
        # One-letter words such as "I" count; scikit-learn's own pattern drops them.
        counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
        pipeline = make_pipeline(counts, LogisticRegression(C=inverse_penalty, max_iter=1000))
        pipeline.fit(fit_texts, fit_labels)
        return cls(pipeline, float(pipeline.score(heldout_texts, heldout_labels)))

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """P(positive), [N]."""
        probabilities: Floats = self.pipeline.predict_proba(list(texts))[:, 1]
        return probabilities

    def log_odds(self, texts: Sequence[str]) -> Floats:
        """log(P(positive) / P(negative)), [N]; it does not saturate as the probabilities do."""
        log_odds: Floats = self.pipeline.decision_function(list(texts))
        return log_odds


def read_labelled(source: str | Path) -> Iterator[tuple[str, str]]:
    """Text and label of each row.

    Raises:
        DataError: a row without `text`, or whose `label` is neither "positive" nor "negative".
    """
    for row in read_rows(source):
        yield row.text("text"), _label(row)


def _label(row: Row) -> str:
    label = row.text("label")
    if label not in LABELS:
        raise row.error(f'field "label" must be "positive" or "negative", not {label!r:.40}')
    return label
