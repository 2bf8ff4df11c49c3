"""The classifier learns sentiment from labelled texts, says how well, and refuses labels it cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.data.rows import write_rows
from rlhf.data.sentiment import SentimentClassifier
from rlhf.data.settings import WorldSettings
from rlhf.data.world import run as make_world
from rlhf.errors import DataError
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = WorldSettings(texts=1, heldout_texts=1, prompts=1, heldout_prompts=1, labelled=1500)
    settings = Settings(run=RunSettings(folder=tmp_path_factory.mktemp("world")), world=sizes)
    make_world(settings)
    return settings.paths.labelled


@pytest.fixture(scope="module")
def classifier(labelled: Path) -> SentimentClassifier:
    return SentimentClassifier.fit(labelled, seed=0)


def rows_of(*labels: str) -> list[dict[str, Any]]:
    return [{"text": f"text {number} of {label}", "label": label} for number, label in enumerate(labels)]


def test_it_tells_the_sentiment_of_reviews_it_has_not_seen(classifier: SentimentClassifier) -> None:
    assert classifier.heldout_accuracy > 0.93
    good, bad, open_ = classifier.probabilities(
        ["The plot is brilliant and the songs are lovely.", "The plot is awful and dull.", "The plot of this western"]
    )
    assert good > 0.8
    assert bad < 0.2
    assert 0.2 < open_ < 0.8


def test_the_seed_decides_which_texts_are_held_out(labelled: Path, classifier: SentimentClassifier) -> None:
    texts = ["The pace is fine.", "I saw it last week."]
    again, other = SentimentClassifier.fit(labelled, seed=0), SentimentClassifier.fit(labelled, seed=1)
    assert np.array_equal(again.probabilities(texts), classifier.probabilities(texts))
    assert not np.array_equal(other.probabilities(texts), classifier.probabilities(texts))


def test_accuracy_is_of_texts_that_were_held_out(tmp_path: Path) -> None:
    """Labels without any relation to the texts: tested on what it was fitted from, it would seem to know them."""
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(4000)]
    rows = [
        {"text": " ".join(letters[i : i + 10]), "label": ("positive", "negative")[rng.integers(2)]} for i in range(400)
    ]
    write_rows(tmp_path / "labels.jsonl", rows)
    assert 0.3 < SentimentClassifier.fit(tmp_path / "labels.jsonl", seed=0).heldout_accuracy < 0.7


def test_labels_it_does_not_know_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    write_rows(path, [*rows_of("positive", "negative"), {"text": "a", "label": "neutral"}])
    with pytest.raises(DataError, match=r"labels\.jsonl:3: .*must be \"positive\" or \"negative\""):
        SentimentClassifier.fit(path, 0)


def test_too_few_of_a_label_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    write_rows(path, rows_of(*["positive"] * 30, *["negative"] * 9))
    with pytest.raises(DataError, match="has 9 negative texts; a classifier needs 10"):
        SentimentClassifier.fit(path, 0)


def test_log_odds_are_those_of_the_probabilities(classifier: SentimentClassifier) -> None:
    texts = ["The plot is brilliant.", "The plot is dull.", "A western"]
    p = classifier.probabilities(texts)
    assert classifier.log_odds(texts) == pytest.approx(np.log(p / (1 - p)))


def test_a_penalty_takes_weight_from_what_few_texts_have(labelled: Path, classifier: SentimentClassifier) -> None:
    penalised = SentimentClassifier.fit(labelled, 0, inverse_penalty=0.01)
    texts = ["The plot is brilliant.", "The plot is dull."]
    assert (abs(penalised.log_odds(texts)) < 0.5 * abs(classifier.log_odds(texts))).all()
    assert penalised.heldout_accuracy > 0.8
