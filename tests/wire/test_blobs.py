from __future__ import annotations

import errno
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from rlhf.errors import RequestError, StorageError
from rlhf.wire.blobs import read_blob, remove_blob, remove_blobs, write_blob
from rlhf.wire.records import Blob

DATA = bytes(range(256)) * 10


def place(blob: Blob) -> Path:
    return Path(unquote(urlsplit(blob.uri).path))


def age(path: Path, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(path, (then, then))


@pytest.mark.parametrize("data", [DATA, b""])
def test_a_blob_comes_back(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "not there yet, and with a blank: ü"
    blob = write_blob(folder, data)
    assert (blob.size_bytes, blob.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert list(folder.iterdir()) == [place(blob)]
    assert read_blob(folder, blob) == data


def test_a_blob_goes_without_another_of_the_same_content(tmp_path: Path) -> None:
    first, second = write_blob(tmp_path, DATA), write_blob(tmp_path, DATA)
    remove_blob(tmp_path, first)
    remove_blob(tmp_path, first)
    with pytest.raises(RequestError, match="no such blob"):
        read_blob(tmp_path, first)
    assert read_blob(tmp_path, second) == DATA


def test_a_folder_may_be_named_in_more_than_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "blobs")
    monkeypatch.chdir(tmp_path)
    blob = write_blob(Path("blobs"), DATA)
    assert read_blob(tmp_path / "link", blob) == DATA


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (DATA[:-1] + b"x", "not that of its sha256"),
        (DATA[:-1], "2560 bytes expected, the file has 2559"),
        (DATA + b"x", "2560 bytes expected, the file has 2561"),
        (None, "there is no such blob"),
    ],
)
def test_a_blob_that_is_not_as_it_was_written(tmp_path: Path, content: bytes | None, says: str) -> None:
    blob = write_blob(tmp_path, DATA)
    place(blob).unlink() if content is None else place(blob).write_bytes(content)
    with pytest.raises(RequestError, match=says):
        read_blob(tmp_path, blob)


def test_a_blob_of_another_size_than_announced(tmp_path: Path) -> None:
    blob = replace(write_blob(tmp_path, DATA), size_bytes=2**64 - 1)
    with pytest.raises(RequestError, match="18446744073709551615 bytes expected, the file has 2560"):
        read_blob(tmp_path, blob)


def test_no_other_file_is_read_or_removed(tmp_path: Path) -> None:
    """Each of these names a file that is there, with its right size and hash."""
    folder = tmp_path / "blobs"
    blob, other = write_blob(folder, DATA), write_blob(tmp_path / "other", DATA)
    (folder / "secret").write_bytes(DATA)
    (folder / blob.sha256).write_bytes(DATA)
    uris = [
        other.uri,
        f"{folder.as_uri()}/../other/{place(other).name}",
        f"{folder.as_uri()}/secret",
        f"{folder.as_uri()}/{blob.sha256}",
        str(place(blob)),
        f"https://example.org/{place(blob).name}",
        "",
        "file:///\0",
    ]
    strange = [replace(blob, uri=uri) for uri in uris] + [replace(blob, sha256=name) for name in ("", "0" * 64)]
    for one in strange:
        with pytest.raises(RequestError, match="not a blob of"):
            read_blob(folder, one)
        with pytest.raises(RequestError, match="not a blob of"):
            remove_blob(folder, one)
    assert place(other).exists()
    assert read_blob(folder, blob) == DATA


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a blob of 2560 bytes could not be written"):
        write_blob(tmp_path / "file", DATA)
    blob = write_blob(tmp_path, DATA)
    place(blob).unlink()
    place(blob).mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        read_blob(tmp_path, blob)
    with pytest.raises(StorageError, match="cannot be removed"):
        remove_blob(tmp_path, blob)


def test_nothing_is_left_of_a_blob_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_blob(tmp_path, DATA)
    assert list(tmp_path.iterdir()) == []


def test_old_blobs_go_and_others_stay(tmp_path: Path) -> None:
    old, kept, young = (write_blob(tmp_path, bytes([number])) for number in range(3))
    half_written, foreign = tmp_path / f".{place(old).name}.tmp", tmp_path / "notes.txt"
    for path in (half_written, foreign):
        path.touch()
    for path in (place(old), place(kept), half_written, foreign):
        age(path, 100)
    assert remove_blobs(tmp_path, {kept.sha256}, older_than_s=50) == 2
    assert set(tmp_path.iterdir()) == {place(kept), place(young), foreign}
    assert remove_blobs(tmp_path, {kept.sha256}, older_than_s=50) == 0


def test_a_folder_that_is_not_there_holds_no_blobs(tmp_path: Path) -> None:
    assert remove_blobs(tmp_path / "none", (), older_than_s=0) == 0
