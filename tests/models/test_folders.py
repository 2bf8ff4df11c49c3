from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import ModelError, StorageError
from rlhf.models import folders
from rlhf.models.causal import load_causal_lm
from rlhf.models.folders import read_json, recover_folder, replacing_folder, sha256_file, start_model, write_json
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.training_state import load_training_state, save_training_state
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from support.tiny import tiny_lm_folder, tiny_reward_folder


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_and_fail(target: Path) -> None:
    with replacing_folder(target) as temporary:
        (temporary / "weights").write_text("new")
        raise RuntimeError("stop")


def test_new_folder_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with replacing_folder(target) as temporary:
            (temporary / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replacing_folder(target) as temporary:
        (temporary / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        fill_and_fail(target)
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_full_disk_is_a_storage_error_naming_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=f"{tmp_path / 'model'} could not be written: No space left"),
        replacing_folder(tmp_path / "model"),
    ):
        no_space()
    assert list(tmp_path.iterdir()) == []


def test_rust_libraries_errors_are_read_for_their_errno(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"), replacing_folder(tmp_path / "model"):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


def test_full_disk_at_the_last_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with replacing_folder(target) as temporary:
        (temporary / "weights").write_text("old")
    rename = os.rename

    def rename_but_not_the_new(source: Path, destination: Path) -> None:
        if Path(source).name.endswith(".tmp"):
            no_space()
        rename(source, destination)

    monkeypatch.setattr(folders.os, "rename", rename_but_not_the_new)
    with pytest.raises(StorageError), replacing_folder(target) as temporary:
        (temporary / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"


def test_parent_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"), replacing_folder(tmp_path / "file" / "model"):
        pass


def test_json_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    monkeypatch.setattr(folders.os, "fsync", no_space)
    with pytest.raises(StorageError, match=r"state\.json"):
        write_json(path, {"step": 2})
    assert read_json(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ModelError, match=r"b\.json cannot be read as JSON"):
        read_json(tmp_path / "b.json")


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty").startswith("e3b0c44298fc1c14")


def test_start_model_is_sft_else_pretrained_else_a_sentence(tmp_path: Path) -> None:
    settings = Settings(run=RunSettings(folder=tmp_path, name="r"))
    with pytest.raises(ModelError, match="run `rlhf pretrain` first"):
        start_model(settings)
    settings.paths.pretrained.mkdir(parents=True)
    assert start_model(settings) == settings.paths.pretrained
    settings.paths.sft.mkdir()
    assert start_model(settings) == settings.paths.sft
    named = settings.model_copy(update={"run": settings.run.model_copy(update={"model": tmp_path / "mine"})})
    assert start_model(named) == tmp_path / "mine"


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def replace_until(target: Path, monkeypatch: pytest.MonkeyPatch, last_rename: int) -> None:
    """Replaces a folder, and is killed before a later rename. What `finally` does, a killed process does not."""
    rename, renames = os.rename, iter(range(1, 10))

    def rename_or_die(source: Path, destination: Path) -> None:
        if next(renames) > last_rename:
            raise Killed
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "rename", rename_or_die)
        with pytest.raises(Killed), replacing_folder(target) as temporary:
            (temporary / "weights").write_text("new")


def old_folder(target: Path) -> Path:
    with replacing_folder(target) as temporary:
        (temporary / "weights").write_text("old")
    return target


@pytest.mark.parametrize(("last_rename", "found"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_kill_between_renames_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_rename: int, found: str
) -> None:
    target = old_folder(tmp_path / "model")
    replace_until(target, monkeypatch, last_rename)
    recover_folder(target)
    assert (target / "weights").read_text() == found
    with replacing_folder(target) as temporary:
        (temporary / "weights").write_text("newer")
    assert (target / "weights").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_after_a_kill_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_folder(tmp_path / "model")
    replace_until(target, monkeypatch, 1)
    with pytest.raises(RuntimeError, match="stop"):
        fill_and_fail(target)
    assert (target / "weights").read_text() == "old"


def test_recovering_waits_for_a_process_that_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_folder(tmp_path / "model")
    replace_until(target, monkeypatch, 1)

    def second_rename(_: float) -> None:
        (target / "theirs").mkdir(parents=True)

    monkeypatch.setattr(folders.time, "sleep", second_rename)
    recover_folder(target)
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_who_reads_a_folder_recovers_it(tmp_path: Path) -> None:
    settings = Settings(run=RunSettings(folder=tmp_path, name="r"))
    lost = [tiny_lm_folder(settings.paths.sft), tiny_reward_folder(tmp_path / "reward"), tmp_path / "state"]
    save_training_state(lost[2], {}, {"step": 3})
    readers: list[Callable[[], object]] = [
        lambda: start_model(settings),
        lambda: load_causal_lm(lost[0]),
        lambda: load_tokenizer(lost[0]),
        lambda: RewardModel.load(lost[1]),
        lambda: load_training_state(lost[2]),
    ]
    for reader, folder in zip(readers, (lost[0], lost[0], lost[0], lost[1], lost[2]), strict=True):
        folder.rename(folder.with_name(f".{folder.name}.old"))
        reader()
        assert folder.is_dir()


def test_what_is_durable_on_return_has_its_rename_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(handle: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def note_rename(source: Path, destination: Path) -> None:
        flushed.append(f"-> {Path(destination).name}")
        rename(source, destination)

    monkeypatch.setattr(folders.os, "fsync", note_fsync)
    monkeypatch.setattr(folders.os, "rename", note_rename)
    monkeypatch.setattr(folders.os, "replace", note_rename)
    with replacing_folder(tmp_path / "model"):
        pass
    assert flushed == [".model.tmp", "-> model", tmp_path.name]
    write_json(tmp_path / "a.json", 1)
    assert flushed[3:] == [".a.json.tmp", "-> a.json", tmp_path.name]
