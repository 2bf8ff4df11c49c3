"""Arrays too large for a message, as files of a folder that writer and reader share at the same path.

A file never changes, and belongs to one message: equal content is written again under another name, so that whoever is
done with a message can remove its blobs. It appears complete or not at all, except to a power cut, which the hash finds
out: what is lost can be computed again.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Container
from pathlib import Path

from rlhf.errors import RequestError, StorageError
from rlhf.wire.records import Blob

_NAME = re.compile(r"([0-9a-f]{64})-[0-9a-f]{32}")
_OURS = re.compile(rf"\.?{_NAME.pattern}(\.tmp)?")
"""Blobs, and what a kill leaves of one that was being written."""


def write_blob(folder: Path, data: bytes) -> Blob:
    """
    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    folder = folder.resolve()
    path = folder / f"{sha256}-{uuid.uuid4().hex}"
    temporary = folder / f".{path.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: a blob of {len(data)} bytes could not be written: {error.strerror}; make room, or name another "
            "folder in reference.blobs"
        ) from error
    return Blob(path.as_uri(), len(data), sha256)


def read_blob(folder: Path, blob: Blob) -> bytes:
    """
    Raises:
        RequestError: the blob is not of this folder, is not there, or is not what its size and hash say.
        StorageError: the file cannot be read.
    """
    path = _path(folder.resolve(), blob)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise RequestError(
            f"{blob.uri}: there is no such blob; it was removed, or reference service and trainer share no folder"
        ) from error
    except OSError as error:
        raise StorageError(f"{path}: the blob cannot be read: {error.strerror}") from error
    if len(data) != blob.size_bytes:
        raise RequestError(f"{blob.uri}: {blob.size_bytes} bytes expected, the file has {len(data)}")
    if hashlib.sha256(data).hexdigest() != blob.sha256:
        raise RequestError(f"{blob.uri}: its content is not that of its sha256; the file was altered or damaged")
    return data


def remove_blob(folder: Path, blob: Blob) -> None:
    """By whoever is done with the message that names it; one that is gone already is no error.

    Raises:
        RequestError: the blob is not of this folder.
        StorageError: the folder cannot be written.
    """
    path = _path(folder.resolve(), blob)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: the blob cannot be removed: {error.strerror}") from error


def remove_blobs(folder: Path, keep: Container[str], older_than_s: float) -> int:
    """Removes what nobody will ask for, and says how many files that were.

    Args:
        keep: sha256 of blobs that stay, however old.
        older_than_s: others stay until they are this old; long enough for a blob to be named in a message and arrive.

    Raises:
        StorageError: the folder cannot be read or written.
    """
    try:
        paths = list(folder.iterdir()) if folder.exists() else []
        named = [(path, _OURS.fullmatch(path.name)) for path in paths]
        unwanted = [path for path, ours in named if ours and ours[1] not in keep]
        return sum(_removed(path, time.time() - older_than_s) for path in unwanted)
    except OSError as error:
        raise StorageError(f"{folder}: old blobs could not be removed: {error.strerror}") from error


def _removed(path: Path, written_before_s: float) -> bool:
    """A file that is being written has another name from one moment to the next."""
    try:
        if path.stat().st_mtime >= written_before_s:
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _path(folder: Path, blob: Blob) -> Path:
    """The URI comes from the network: rather than to be followed, it must be the one that `write_blob` gave."""
    path = folder / blob.uri.rpartition("/")[2]
    name = _NAME.fullmatch(path.name)
    if name is None or name[1] != blob.sha256 or blob.uri != path.as_uri():
        raise RequestError(
            f"{blob.uri}: not a blob of {folder}; give reference service and trainer one folder in reference.blobs"
        )
    return path
