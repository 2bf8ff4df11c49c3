"""Snapshots: one hash for one set of rows; an annotator who is withdrawn leaves nothing behind."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import DataError
from rlhf.feedback.judgments import CompletionShown, Judgment, write_judgments
from rlhf.feedback.snapshots import (
    Snapshot,
    joined,
    load_snapshot,
    read_snapshot,
    snapshot_of,
    snapshot_sha256,
    withdraw,
    write_snapshot,
)


def judged(number: int, annotator: str) -> Judgment:
    return Judgment(
        judgment_id=f"{number}/{annotator}",
        task_id=str(number),
        prompt=f"prompt {number}",
        completions=(CompletionShown("a"), CompletionShown("ü")),
        ranks=(1, 2),
        annotator=annotator,
        source="random",
    )


ROWS = [judged(number, annotator) for number in range(6) for annotator in "xyz"]


@given(st.randoms(use_true_random=False))
def test_the_hash_is_that_of_the_set(chance: random.Random) -> None:
    mixed = [*ROWS, ROWS[3]]
    chance.shuffle(mixed)
    assert snapshot_of(mixed).sha256 == snapshot_of(ROWS, ["a"]).sha256
    assert len(snapshot_of(mixed).judgments) == len(ROWS)
    chance.shuffle(rows := list(ROWS))
    assert snapshot_sha256(rows) == snapshot_of(ROWS).sha256


def test_every_field_counts() -> None:
    hashes = {snapshot_of([replace(ROWS[0], **change)]).sha256 for change in ({}, {"reason": "x"}, {"p_select": 0.5})}
    assert len(hashes) == 3


def test_two_judgments_under_one_id_are_refused() -> None:
    with pytest.raises(DataError, match=r"both 0/x.*feedback\.dataset"):
        snapshot_of([ROWS[0], replace(ROWS[0], ranks=(2, 1))])


def test_withdrawing_is_as_if_they_had_never_been_there() -> None:
    left = withdraw(snapshot_of(ROWS), "y")
    assert left.sha256 == snapshot_of([row for row in ROWS if row.annotator != "y"]).sha256
    assert left.withdrawn == ("y",)
    again = joined(left, [judged(9, "y"), judged(9, "x")], "more")
    assert {row.annotator for row in again.judgments} == {"x", "z"}
    assert len(again.judgments) == len(left.judgments) + 1


def test_a_snapshot_survives_its_folder(tmp_path: Path) -> None:
    for snapshot in (withdraw(snapshot_of(ROWS, ["b", "a"]), "x"), Snapshot((), (), ("x",))):
        write_snapshot(tmp_path / "s", snapshot)
        assert read_snapshot(tmp_path / "s") == snapshot == load_snapshot(tmp_path / "s")
    write_snapshot(tmp_path / "t", snapshot_of(reversed(ROWS)))
    write_snapshot(tmp_path / "u", snapshot_of(ROWS))
    files = [(tmp_path / name / "judgments.jsonl").read_bytes() for name in "tu"]
    assert files[0] == files[1]


def test_altered_rows_are_noticed(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "s", snapshot_of(ROWS))
    path = tmp_path / "s" / "judgments.jsonl"
    path.write_text(path.read_text().replace('"ranks": [1, 2]', '"ranks": [2, 1]', 1))
    with pytest.raises(DataError, match=r"other rows than snapshot\.json says"):
        load_snapshot(tmp_path / "s")
    with pytest.raises(DataError, match="is no snapshot"):
        read_snapshot(tmp_path)


def test_any_judgments_are_a_snapshot(tmp_path: Path) -> None:
    write_judgments(tmp_path / "j.parquet", ROWS)
    assert load_snapshot(tmp_path / "j.parquet").sha256 == snapshot_of(ROWS).sha256
