"""The judge learns sentiment from labelled texts, says how well, and refuses labels it cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.data.rows import write_rows
from rlhf.data.settings import WorldSettings
from rlhf.data.world import run as make_world
from rlhf.errors import DataError, SettingsError
from rlhf.evaluate.judge import ClassifierJudge, RuleJudge, load_judge
from rlhf.reward.rules import ScoreItem
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = WorldSettings(texts=1, heldout_texts=1, prompts=1, heldout_prompts=1, labelled=1500)
    settings = Settings(run=RunSettings(folder=tmp_path_factory.mktemp("world")), world=sizes)
    make_world(settings)
    return settings.paths.labelled


@pytest.fixture(scope="module")
def judge(labelled: Path) -> ClassifierJudge:
    return ClassifierJudge.fit(labelled, seed=0)


def rows_of(*labels: str) -> list[dict[str, Any]]:
    return [{"text": f"text {number} of {label}", "label": label} for number, label in enumerate(labels)]


def test_it_tells_the_sentiment_of_reviews_it_has_not_seen(judge: ClassifierJudge) -> None:
    assert judge.heldout_accuracy > 0.93
    good, bad, open_ = judge.score(
        ["The plot is brilliant and the songs are lovely.", "The plot is awful and dull.", "The plot of this western"]
    )
    assert good > 0.8
    assert bad < 0.2
    assert 0.2 < open_ < 0.8


def test_it_reads_prompt_and_completion_as_one_text(judge: ClassifierJudge) -> None:
    split, whole = judge.judge([ScoreItem("I thought it was aw", "ful.")]), judge.score(["I thought it was awful."])
    assert split == whole


def test_the_seed_decides_which_texts_are_held_out(labelled: Path, judge: ClassifierJudge) -> None:
    texts = ["The pace is fine.", "I saw it last week."]
    again, other = ClassifierJudge.fit(labelled, seed=0), ClassifierJudge.fit(labelled, seed=1)
    assert np.array_equal(again.score(texts), judge.score(texts))
    assert not np.array_equal(other.score(texts), judge.score(texts))


def test_accuracy_is_of_texts_that_were_held_out(tmp_path: Path) -> None:
    """Labels without any relation to the texts: a judge that were tested on what it learnt would seem to know them."""
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(4000)]
    rows = [
        {"text": " ".join(letters[i : i + 10]), "label": ("positive", "negative")[rng.integers(2)]} for i in range(400)
    ]
    write_rows(tmp_path / "labels.jsonl", rows)
    assert 0.3 < ClassifierJudge.fit(tmp_path / "labels.jsonl", seed=0).heldout_accuracy < 0.7


def test_labels_it_does_not_know_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    write_rows(path, [*rows_of("positive", "negative"), {"text": "a", "label": "neutral"}])
    with pytest.raises(DataError, match=r"labels\.jsonl:3: .*must be \"positive\" or \"negative\""):
        load_judge(path, 0)


def test_too_few_of_a_label_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    write_rows(path, rows_of(*["positive"] * 30, *["negative"] * 9))
    with pytest.raises(DataError, match="has 9 negative texts; a judge needs 10"):
        load_judge(path, 0)


def test_a_rule_can_judge(tmp_path: Path) -> None:
    rule = tmp_path / "own_rule.py"
    rule.write_text("def length(items):\n    return [len(item.completion) for item in items]\n")
    judge = load_judge(f"{rule}:length", 0)
    assert isinstance(judge, RuleJudge)
    assert judge.judge([ScoreItem("p", "four"), ScoreItem("p", "")]).tolist() == [4.0, 0.0]
    assert (judge.name, judge.heldout_accuracy) == (f"{rule}:length", None)


def test_missing_judges_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        load_judge(str(tmp_path / "none.jsonl"), 0)
    with pytest.raises(SettingsError, match="module:function"):
        load_judge("nonsense", 0)
