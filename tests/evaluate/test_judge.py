"""A judge is a classifier of labelled texts or a person's own rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.data.rows import write_rows
from rlhf.data.sentiment import SentimentClassifier
from rlhf.errors import DataError, SettingsError
from rlhf.evaluate.judge import RuleJudge, load_judge
from rlhf.reward.rules import ScoreItem


def test_labelled_texts_make_a_judge_that_reads_prompt_and_completion_as_one(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    labels = {"fine": "positive", "awful": "negative"}
    write_rows(path, [{"text": f"film {n} is {word}", "label": labels[word]} for n in range(40) for word in labels])
    judge = load_judge(path, 0)
    assert (judge.name, judge.heldout_accuracy) == (str(path), 1.0)
    split, bad = judge.judge([ScoreItem("it is fi", "ne"), ScoreItem("it is aw", "ful")])
    assert [split, bad] == SentimentClassifier.fit(path, 0).probabilities(["it is fine", "it is awful"]).tolist()
    assert bad < 0.5 < split


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
