"""One supervisor per run folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import StageFailed, StorageError
from rlhf.settings.paths import RunPaths

MOMENT_S = 0.3


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Holds the file's lock; the kernel lets go of it when this process ends, however it ends.

    Raises:
        StageFailed: another process holds it.
        StorageError: the folder cannot be written.
    """
    handle = _open(path)
    try:
        if not _taken_soon(handle):
            raise StageFailed(
                f"{path.parent} is in use by another `rlhf run` (process {holder(path)}); stop that one, or choose "
                "another --run"
            )
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Somebody supervises this run now."""
    if not path.exists():
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        return not _taken(handle)
    finally:
        os.close(handle)


def embedded_redis_runs(paths: RunPaths) -> bool:
    """`address.json` alone does not say so: whoever is killed leaves it behind."""
    return is_held(paths.redis / "lock")


def holder(path: Path) -> str:
    """Number of the process that took the lock last."""
    return path.read_text().strip() or "unknown"


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; choose another run.folder") from error


def _taken_soon(handle: int) -> bool:
    """`is_held` takes the lock for a moment, which is no reason to refuse."""
    deadline_s = time.monotonic() + MOMENT_S
    while not _taken(handle):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
