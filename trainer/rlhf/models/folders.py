"""Folders and small files that appear complete or not at all.

A target is filled under a temporary name that starts with a dot, flushed to the disk and renamed, and the rename is
flushed too. A kill leaves the old target or the new one. Replacing a folder takes two renames; after a kill between
them the old one lies under `.NAME.old`, and `recover_folder`, which readers call first, gives it its name back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import ModelError, StorageError

if TYPE_CHECKING:
    from rlhf.settings.run import Settings

_STORAGE_ERRNOS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR)
)

_BETWEEN_RENAMES_S = 0.1
"""A process that lives is long past its second rename after this time."""


def start_model(settings: Settings) -> Path:
    """The model that steps 2 and 3 start from: `run.model`, or else the run's `sft/`, or else its `pretrained/`.

    Raises:
        ModelError: there is none.
    """
    if settings.run.model is not None:
        return settings.run.model
    for folder in (settings.paths.sft, settings.paths.pretrained):
        recover_folder(folder)
        if folder.is_dir():
            return folder
    raise ModelError(
        f"no model to start from: neither {settings.paths.sft} nor {settings.paths.pretrained} exists; "
        "run `rlhf pretrain` first, or name a folder in run.model"
    )


def sha256_file(path: str | Path) -> str:
    """Lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its place when the block ends without an exception.

    Raises:
        StorageError: the disk is full or the folder cannot be written. Whatever was at `target` is still there.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.tmp")
    recover_folder(target)
    with storage_errors(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            _flush(*temporary.rglob("*"), temporary)
            _take_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Gives a folder its name back whose replacement was killed between its two renames. Harmless at any other time.

    Raises:
        StorageError: the folder around it cannot be written.
    """
    target = Path(target)
    old = _old(target)
    if target.exists() or not old.is_dir():
        return
    time.sleep(_BETWEEN_RENAMES_S)
    with storage_errors(target), suppress(FileNotFoundError):
        if not target.exists():
            os.rename(old, target)
            _flush(target.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file at once.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """
    Raises:
        ModelError: missing, or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into StorageError, the Rust libraries' own exceptions included."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number not in _STORAGE_ERRNOS:
            raise
        raise StorageError(
            f"{target} could not be written: {os.strerror(number)}; make room or choose another folder, "
            "and run the command again"
        ) from error


def _errno(error: Exception) -> int:
    """safetensors and tokenizers raise their own classes and name the errno only in the text."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


def _flush(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _take_place(temporary: Path, target: Path) -> None:
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        if replaced:
            os.rename(old, target)
        raise
    _flush(target.parent)
    if replaced:
        # Not removed under its own name: half of a folder must never be taken for one to recover.
        os.rename(old, temporary)
