"""Every rollout that was trained on, one file a step: what `rlhf replay` computes a step again from.

A file `<step>.gz` is gzip over length-prefixed records: a JSON object that says how the step was made (`TrainedStep`,
without the rollouts), then the step's `rlhf.v1.Rollout` messages in the order they were trained in. Files appear
complete or not at all; the oldest go when all together are larger than `ppo.keep_rollouts_mib`. What the step came to
is in metrics.jsonl, not here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError

from rlhf.errors import DataError, RequestError
from rlhf.models.compute import about_machine
from rlhf.models.folders import storage_errors
from rlhf.settings.run import Settings
from rlhf.v1 import rollout_pb2
from rlhf.wire.blobs import read_blob
from rlhf.wire.messages import from_rollout, to_rollout
from rlhf.wire.records import Blob, HiddenStates, Rollout, ScoredCompletion

log = logging.getLogger(__name__)

SUFFIX = ".gz"
LEVEL = 1
"""Log-probs hardly shrink: higher levels take several times as long for a few per cent."""
MAX_RECORD_BYTES = 2**31
"""No protobuf message is larger."""


@dataclass(frozen=True)
class TrainedStep:
    """What one optimisation step was made of."""

    step: int
    """Counts from 1, as in metrics.jsonl: of the weights that it made."""
    epoch: int
    weights_before: str
    """sha256 of the published weights that the step improved."""
    weights_after: str
    """sha256 of those that it published."""
    settings: Mapping[str, Any]
    """All of the run's, as JSON values."""
    settings_sha256: str
    """Of `settings`; see `settings_hash`."""
    machine: Mapping[str, Any]
    """What else decides the last bits: torch's version, the processor's instructions, threads."""
    rollouts: tuple[Rollout, ...]
    """In the order in which they were trained; each with its id, versions, seeds, sampling settings and scores."""


class History:
    """
    Args:
        max_bytes: of all files together; 0 keeps nothing.
    """

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def steps(self) -> list[int]:
        """Those that are kept, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.stem) for path in self.folder.glob(f"*{SUFFIX}") if path.stem.isdecimal())

    def undo_after(self, step: int) -> None:
        """Removes later steps, which a restart undid."""
        for later in self.steps():
            if later > step:
                self._path(later).unlink()

    def keep(self, trained: TrainedStep) -> None:
        """Durable on return; then removes the oldest steps beyond the bound.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        if self.max_bytes == 0:
            return
        path = self._path(trained.step)
        temporary = path.with_name(f".{path.name}.tmp")
        with storage_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    _write(file, trained)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._trim()

    def read(self, step: int) -> TrainedStep:
        """
        Raises:
            DataError: the step is not kept, or its file is damaged.
        """
        path = self._path(step)
        try:
            with gzip.open(path, "rb") as file:
                return _read(file)
        except FileNotFoundError as error:
            raise DataError(f"the rollouts of step {step} are not kept", path=path) from error
        except (OSError, EOFError, zlib.error, ValueError, TypeError, DecodeError, RequestError) as error:
            raise DataError(
                f"is damaged, so step {step} cannot be computed again: {type(error).__name__}: {error}", path=path
            ) from error

    def _trim(self) -> None:
        sizes = {step: self._path(step).stat().st_size for step in self.steps()}
        for step in list(sizes):
            if sum(sizes.values()) <= self.max_bytes:
                return
            if len(sizes) == 1:
                log.warning(
                    "the rollouts of step %d take %.1f MiB and are not kept; raise ppo.keep_rollouts_mib",
                    step,
                    sizes[step] / 2**20,
                )
            del sizes[step]
            self._path(step).unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:06d}{SUFFIX}"


def trained_step(
    settings: Settings, step: int, epoch: int, weights: tuple[str, str], batch: Sequence[Rollout]
) -> TrainedStep:
    """
    Args:
        weights: sha256 of those before and after.

    Raises:
        RlhfError: hidden states are to be kept, and one of their files is missing or damaged.
    """
    blobs = settings.ppo.blobs or settings.paths.blobs
    kept = [with_hidden_states(rollout, blobs) for rollout in batch] if settings.ppo.keep_hidden_states else batch
    content = settings.model_dump(mode="json")
    return TrainedStep(
        step=step,
        epoch=epoch,
        weights_before=weights[0],
        weights_after=weights[1],
        settings=content,
        settings_sha256=settings_hash(content),
        machine=about_machine(),
        rollouts=tuple(kept),
    )


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Lower-case hex of settings as JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def with_hidden_states(rollout: Rollout, blobs: Path) -> Rollout:
    """The rollout with hidden states that lie in files taken into it; the files go when it is acknowledged.

    Raises:
        RlhfError: a file is missing or damaged.
    """
    return replace(rollout, completions=tuple(_inlined(completion, blobs) for completion in rollout.completions))


def _inlined(completion: ScoredCompletion, blobs: Path) -> ScoredCompletion:
    states = completion.ref_hidden
    if states is None or not isinstance(states.content, Blob):
        return completion
    inlined = HiddenStates(states.dtype, states.shape, read_blob(blobs, states.content))
    return replace(completion, ref_hidden=inlined)


def _write(file: BinaryIO, trained: TrainedStep) -> None:
    about = {name: value for name, value in vars(trained).items() if name != "rollouts"}
    # No name and no time, so that equal steps make equal files.
    with gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed:
        _write_record(packed, json.dumps(about, ensure_ascii=False).encode())
        for rollout in trained.rollouts:
            _write_record(packed, to_rollout(rollout).SerializeToString())


def _write_record(file: gzip.GzipFile, record: bytes) -> None:
    file.write(len(record).to_bytes(8, "big"))
    file.write(record)


def _read(file: gzip.GzipFile) -> TrainedStep:
    records = _records(file)
    about = json.loads(next(records, b""))
    rollouts = tuple(from_rollout(rollout_pb2.Rollout.FromString(record)) for record in records)
    return TrainedStep(**about, rollouts=rollouts)


def _records(file: gzip.GzipFile) -> Iterator[bytes]:
    while length := file.read(8):
        size = int.from_bytes(length, "big")
        if size > MAX_RECORD_BYTES:
            raise ValueError(f"a record of {size} bytes is announced")
        record = file.read(size)
        if len(record) != size:
            raise EOFError(f"a record of {size} bytes expected, {len(record)} are left")
        yield record
