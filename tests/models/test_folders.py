from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rlhf.errors import ModelError, StorageError
from rlhf.models import folders
from rlhf.models.folders import read_json, replacing_folder, sha256_file, start_model, write_json
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings


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
