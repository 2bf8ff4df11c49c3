"""The kept rollouts: what is written is read, the bound holds, and damage is named."""

from dataclasses import replace

import numpy as np
import pytest

from rlhf.errors import DataError, RequestError
from rlhf.ppo.history import History, TrainedStep, settings_hash, with_hidden_states
from rlhf.wire.blobs import remove_blob, write_blob
from rlhf.wire.messages import to_rollout
from rlhf.wire.records import HiddenStates
from support.rollouts import rollout, scored


def step_of(number, *rollouts):
    return TrainedStep(
        step=number,
        epoch=2,
        weights_before="a" * 64,
        weights_after="b" * 64,
        settings={"ppo": {"lr": 3e-4}},
        settings_sha256="c" * 64,
        machine={"threads": 1},
        rollouts=rollouts or (rollout(7, scored([5, 6, 7, 8], 2, score=0.1), scored([5, 6, 9], 2)),),
    )


def random_rollout(index):
    """Of a size that compression leaves about as it is."""
    tokens = np.random.default_rng(index).integers(0, 2**31 - 1, 1000).tolist()
    return rollout(index, scored(tokens, 1))


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "history", 2**20)


def test_what_is_kept_is_read(history):
    kept = step_of(3)
    history.keep(kept)
    found = history.read(3)
    assert replace(found, rollouts=()) == replace(kept, rollouts=())
    assert [to_rollout(one) for one in found.rollouts] == [to_rollout(one) for one in kept.rollouts]
    assert history.steps() == [3]


def test_equal_steps_make_equal_files(history, tmp_path):
    other = History(tmp_path / "other", 2**20)
    for one in (history, other):
        one.keep(step_of(3))
    first, second = ((one.folder / "000003.gz").read_bytes() for one in (history, other))
    assert first == second


def test_beyond_the_bound_the_oldest_go(tmp_path):
    without_bound = History(tmp_path / "all", 2**30)
    without_bound.keep(step_of(1, random_rollout(1)))
    size = (tmp_path / "all" / "000001.gz").stat().st_size
    history = History(tmp_path / "some", 3 * size + size // 2)
    for number in range(1, 8):
        history.keep(step_of(number, random_rollout(number)))
    assert history.steps() == [5, 6, 7]
    assert sorted(path.name for path in history.folder.iterdir()) == ["000005.gz", "000006.gz", "000007.gz"]


def test_a_step_larger_than_the_bound_is_not_kept_and_said(tmp_path, caplog):
    history = History(tmp_path, 1000)
    history.keep(step_of(1, random_rollout(1)))
    assert history.steps() == []
    assert "the rollouts of step 1 take 0.0 MiB and are not kept; raise ppo.keep_rollouts_mib" in caplog.text


def test_nothing_is_kept_at_0(tmp_path):
    History(tmp_path / "none").keep(step_of(1))
    assert not (tmp_path / "none").exists()


def test_later_steps_are_undone(history):
    for number in (1, 2, 3, 4):
        history.keep(step_of(number))
    history.undo_after(2)
    assert history.steps() == [1, 2]


def test_a_step_that_is_not_kept(history):
    with pytest.raises(DataError, match=r"000009\.gz: the rollouts of step 9 are not kept"):
        history.read(9)


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "of somebody else"])
def test_damage_is_named(history, damage):
    history.keep(step_of(3))
    path = history.folder / "000003.gz"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "altered":
        content[len(content) // 2] ^= 0xFF
    elif damage == "empty":
        content = b""
    else:
        content = b"notes"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"000003\.gz: is damaged, so step 3 cannot be computed again"):
        history.read(3)


def test_hidden_states_in_files_are_taken_in(tmp_path):
    content = np.arange(4, dtype=np.float32).tobytes()
    blob = write_blob(tmp_path, content)
    outside = replace(scored([5, 6, 7], 1), ref_logprobs=None, ref_hidden=HiddenStates("float32", (2, 2), blob))
    inside = replace(outside, ref_hidden=HiddenStates("float32", (2, 2), content))
    found = with_hidden_states(rollout(0, outside, inside), tmp_path)
    assert [completion.ref_hidden.content for completion in found.completions] == [content, content]
    remove_blob(tmp_path, blob)
    with pytest.raises(RequestError, match="there is no such blob"):
        with_hidden_states(rollout(0, outside), tmp_path)


def test_the_hash_of_settings_knows_values_and_not_their_order():
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})
    assert settings_hash({"a": 1, "b": 2}) != settings_hash({"a": 1, "b": 3})
