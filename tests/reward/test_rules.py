from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.errors import RuleError, SettingsError
from rlhf.reward.rules import Rule, ScoreItem, load_rule

ITEMS = (
    ScoreItem("What is 6 x 7?", "42", (4, 2), {"answer": "42"}),
    ScoreItem("What is 6 x 7?", "a number", (1, 2, 3), {"answer": "42"}),
)
SOURCE = """
from dataclasses import dataclass


@dataclass
class Weight:
    right: float = 1.0


def right(items):
    return [Weight().right * (item.completion == item.metadata["answer"]) - len(item.tokens) / 8 for item in items]
"""


def rule(answer: Any) -> Rule:
    return Rule("test:rule", "", lambda items: answer)


def test_a_rule_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my_rules.py"
    path.write_text(SOURCE)
    loaded = load_rule(f"{path}:right")
    scores = loaded.score(ITEMS)
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.75, -0.375]
    assert loaded.sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()


def test_a_rule_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed_rules.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_rule("installed_rules:right").score(ITEMS).tolist() == [0.75, -0.375]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1.0], r"shape \[1\] for 2 item"),
        ([1.0, 2.0, 3.0], r"shape \[3\] for 2 item"),
        ([[1.0], [2.0]], r"shape \[2, 1\] for 2 item"),
        (1.0, r"shape \[\] for 2 item"),
        (None, "no sequence of numbers|shape"),
        (["a", "b"], "no sequence of numbers"),
        ([1.0, float("nan")], "answered nan for item 1"),
        ([float("inf"), 0.0], "answered inf for item 0"),
        ([1e39, 0.0], "answered inf for item 0"),
    ],
)
def test_nonsense_is_refused(answer: Any, says: str) -> None:
    with pytest.raises(RuleError, match=says):
        rule(answer).score(ITEMS)


@pytest.mark.parametrize("error", [ValueError("bad\nworse"), KeyError("answer"), SystemExit(3), ZeroDivisionError()])
def test_a_rule_that_raises(error: BaseException) -> None:
    def raising(items: Sequence[ScoreItem]) -> Sequence[float]:
        raise error

    with pytest.raises(RuleError, match=f"rule test:raising raised {type(error).__name__}") as caught:
        Rule("test:raising", "", raising).score(ITEMS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_colon", "module:function"),
        (":function", "module:function"),
        ("module:", "module:function"),
        ("no_such_module_here:rule", "no module no_such_module_here can be imported"),
        ("rlhf.reward.no_such:rule", "no module rlhf.reward.no_such can be imported"),
        ("no/such/file.py:rule", "there is no file no/such/file.py"),
        ("rlhf.reward.rules:no_such", "has no function no_such"),
        ("sys:exit", "no source file"),
    ],
)
def test_a_rule_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load_rule(name)


def test_a_module_that_raises_when_imported(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_here\n")
    with pytest.raises(RuleError, match="raised ModuleNotFoundError when imported"):
        load_rule(f"{path}:rule")
