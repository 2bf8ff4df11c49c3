"""Krippendorff's alpha against his own published examples, and agreement over pairs by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from rlhf.feedback.agreement import krippendorff_alpha, pair_agreement_alpha, pairwise_agreement
from rlhf.feedback.judgments import CompletionShown, Judgment


def units(*annotators: str) -> list[list[int | None]]:
    """A column of values for each unit from a row for each annotator; a dot is a missing value."""
    return [[None if value == "." else int(value) for value in unit] for unit in zip(*annotators, strict=True)]


# K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): A, two observers and two values; B, two observers
# and five values; C and D, four observers, values missing.
BINARY = units("0100000010", "1110010000")
TWO = [list(pair) for pair in zip("aabbdcccedda", "babbbccceddd", strict=True)]
FOUR = units("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
# The example of the encyclopedia's article: three coders, fifteen units, most of them coded by two.
THREE = units(".....34121133.3", "1.213343.......", "..21344.21133.4")


def test_two_observers_and_two_values() -> None:
    assert krippendorff_alpha(BINARY) == pytest.approx(0.095, abs=5e-4)


def test_two_observers_and_more_values() -> None:
    assert krippendorff_alpha(TWO) == pytest.approx(0.692, abs=5e-4)


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_four_observers_with_missing_values(level: str, published: float) -> None:
    assert krippendorff_alpha(FOUR, level) == pytest.approx(published, abs=5e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.691), ("interval", 0.811)])
def test_three_coders_who_left_much_out(level: str, published: float) -> None:
    assert krippendorff_alpha(THREE, level) == pytest.approx(published, abs=5e-4)  # type: ignore[arg-type]


def test_perfect_and_undefined_agreement() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2, None]]) == 1.0
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert krippendorff_alpha([[1], [None, 2]]) is None


def test_a_single_value_in_a_unit_changes_nothing() -> None:
    assert krippendorff_alpha([*FOUR, [4], [None, None]], "ordinal") == krippendorff_alpha(FOUR, "ordinal")


def judged(annotator: str, ranks: Sequence[int], texts: str = "abc", task: str = "1") -> Judgment:
    return Judgment(
        judgment_id=f"{task}/{annotator}/{texts}",
        task_id=task,
        prompt="p",
        completions=tuple(map(CompletionShown, texts)),
        ranks=tuple(ranks),
        annotator=annotator,
        source="random",
    )


def test_pairs_are_compared_by_text_wherever_they_lie() -> None:
    assert pairwise_agreement([judged("x", (1, 2, 3)), judged("y", (3, 2, 1), "cba")]) == 1.0
    assert pairwise_agreement([judged("x", (1, 2, 3)), judged("y", (1, 2, 3), "acb")]) == pytest.approx(2 / 3)


def test_ties_are_not_compared() -> None:
    assert pairwise_agreement([judged("x", (1, 1, 2)), judged("y", (1, 2, 3))]) == 1.0
    assert pairwise_agreement([judged("x", (1, 1, 1)), judged("y", (1, 2, 3))]) is None


def test_nobody_is_compared_with_themselves() -> None:
    again = replace(judged("x", (3, 2, 1)), judgment_id="2", task_id="2")
    assert pairwise_agreement([judged("x", (1, 2, 3)), again]) is None
    # Two equal completions in one ranking make no second opinion.
    assert pair_agreement_alpha([judged("x", (1, 2, 2), "abb")]) is None


def test_annotators_without_a_name_are_different_people_within_a_task_alone() -> None:
    first, second = judged("unknown", (1, 2, 3)), replace(judged("unknown", (3, 2, 1)), judgment_id="2")
    assert pairwise_agreement([first, second]) == 0.0
    assert pairwise_agreement([first, replace(second, task_id="2")]) is None


def test_alpha_over_pairs_does_not_depend_on_which_is_listed_first() -> None:
    rankings = [
        judged(name, ranks, task=str(n)) for n, (name, ranks) in enumerate([("x", (1, 2, 3)), ("y", (2, 1, 3))])
    ]
    listed = [replace(j, completions=j.completions[::-1], ranks=j.ranks[::-1]) for j in rankings]
    assert pair_agreement_alpha(rankings) == pair_agreement_alpha(listed)
    assert pair_agreement_alpha([rankings[0], replace(rankings[0], annotator="y", judgment_id="z")]) == 1.0
