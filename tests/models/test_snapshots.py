"""Snapshots stay spread over the run, within their number, and are ordinary model folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.models.causal import load_causal_lm
from rlhf.models.snapshots import remove_snapshots_after, save_snapshot, snapshots, surplus_steps
from support.tiny import tiny_lm, tiny_tokenizer


def test_they_are_models_by_step(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    assert snapshots(folder) == {}
    for step in (9, 10, 2):
        save_snapshot(folder, step, tiny_lm(seed=step), tiny_tokenizer(), keep=9)
    (folder / ".11.tmp").mkdir()
    assert list(snapshots(folder)) == [2, 9, 10]
    loaded, saved = load_causal_lm(snapshots(folder)[9]), tiny_lm(seed=9)
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))


def test_no_more_are_kept_than_asked_for(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_snapshot(tmp_path, step, tiny_lm(), tiny_tokenizer(), keep=3)
        assert len(snapshots(tmp_path)) == min(step, 3)
    assert list(snapshots(tmp_path)) == [2, 4, 6]


def test_those_that_a_restart_undid_go(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_snapshot(tmp_path, step, tiny_lm(), tiny_tokenizer(), keep=9)
    remove_snapshots_after(tmp_path, 4)
    assert list(snapshots(tmp_path)) == [2, 4]
    remove_snapshots_after(tmp_path / "none", 0)


@pytest.mark.parametrize("keep", [1, 2, 4, 7])
def test_what_is_kept_is_spread_and_holds_the_newest(keep: int) -> None:
    steps: list[int] = []
    for step in range(5, 1000, 5):
        steps.append(step)
        steps = [one for one in steps if one not in surplus_steps(steps, keep)]
        assert len(steps) <= keep
        assert steps[-1] == step
    gaps = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert max(gaps[:-1], default=0) <= 2.1 * 1000 / keep
