"""The weights service: new weights in two phases, one change at a time, while the engine goes on serving.

    Prepare / Upload    verify and load beside the current weights      side thread
    Commit, Rollback    switch                                          engine thread, between two steps

`rlhf.ppo.publish` is the caller in a run; `rlhf.policy.follower` makes the same changes when a publish passed it by.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from rlhf.errors import ModelError, RequestError
from rlhf.models.folders import storage_errors, write_json
from rlhf.models.weights import MANIFEST_FILE, WEIGHTS_FILE, AdapterOf, Manifest
from rlhf.policy.engine import Engine, Versions
from rlhf.policy.engine_thread import EngineThread
from rlhf.v1 import weights_pb2, weights_pb2_grpc
from rlhf.wire.messages import from_version, to_version
from rlhf.wire.records import WeightVersion

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

PREPARE_TIMEOUT_S = 120.0
"""For sequences to leave the weights whose place is needed, where the call has no deadline of its own."""

UPLOAD_HEADER_BYTES = 2**20
"""Room for the names and shapes of an upload, beside twice the weights' own size: they may come in a wider format."""


class WeightChanges:
    """Changes of the engine's weights, one after the other."""

    def __init__(self, engine: Engine, thread: EngineThread, *, keep: bool) -> None:
        """
        Args:
            keep: what happens to sequences in flight where a commit does not say; see `Engine.commit`.
        """
        self._engine = engine
        self._thread = thread
        self._keep = keep
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[Any] | None = None

    @property
    def versions(self) -> Versions:
        return self._engine.versions

    async def prepare(self, folder: Path, version: WeightVersion, timeout_s: float = PREPARE_TIMEOUT_S) -> None:
        """See `Engine.prepare`."""
        await self._alone(lambda: asyncio.to_thread(self._engine.prepare, folder, version, timeout_s))

    async def commit(
        self, version: WeightVersion, expected_current: WeightVersion | None, *, keep: bool | None = None
    ) -> Versions:
        """See `Engine.commit`; `keep` None takes the setting."""
        keep = self._keep if keep is None else keep
        before = self.versions.current
        versions = await self._alone(lambda: self._switch(self._engine.commit, version, expected_current, keep=keep))
        if versions.current != before:
            log.info("weights %s are current", versions.current)
        return versions

    async def rollback(self, expected_current: WeightVersion | None) -> Versions:
        """See `Engine.rollback`."""
        versions = await self._alone(lambda: self._switch(self._engine.rollback, expected_current, keep=self._keep))
        log.warning("rolled back to weights %s", versions.current)
        return versions

    async def _switch(self, function: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> Versions:
        await self._thread.run(function, *args, **kwargs)
        return self.versions

    async def _alone(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The change's result, once those before it are done.

        A thread cannot be stopped half way: a caller that goes away ends its change only before it begins, and the
        lock is let go when the thread is done, whoever still waits for it.
        """
        await self._lock.acquire()
        task = asyncio.create_task(change())
        self._task = task  # the event loop alone would let it be collected
        task.add_done_callback(lambda _: self._lock.release())
        return await asyncio.shield(task)


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    def __init__(self, changes: WeightChanges, tokenizer_sha256: str, weights_bytes: int) -> None:
        """
        Args:
            weights_bytes: of the engine's own weights, by which an upload is bounded.
        """
        self._changes = changes
        self._tokenizer_sha256 = tokenizer_sha256
        self._max_upload_bytes = 2 * weights_bytes + UPLOAD_HEADER_BYTES

    async def Prepare(self, request: weights_pb2.PrepareRequest, context: Any) -> weights_pb2.PrepareResponse:
        version = _required(request, "version")
        if request.uri:
            await self._changes.prepare(folder_of(request.uri), version, _timeout_s(context))
        elif version not in (self._changes.versions.prepared, self._changes.versions.current):
            raise RequestError(f"uri: empty, and weights {version} were not uploaded; give a folder, or call Upload")
        return weights_pb2.PrepareResponse(prepared=to_version(version))

    async def Upload(
        self, request_iterator: AsyncIterator[weights_pb2.UploadChunk], context: Any
    ) -> weights_pb2.PrepareResponse:
        # Not in a thread: a caller that left while it ran would leave the folder behind.
        folder = Path(tempfile.mkdtemp(prefix="rlhf-weights-"))
        try:
            version = await self._receive(request_iterator, folder)
            await self._changes.prepare(folder, version, _timeout_s(context))
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return weights_pb2.PrepareResponse(prepared=to_version(version))

    async def Commit(self, request: weights_pb2.CommitRequest, context: Any) -> weights_pb2.CommitResponse:
        keep = {weights_pb2.IN_FLIGHT_WAIT: False, weights_pb2.IN_FLIGHT_KEEP: True}.get(request.in_flight)
        versions = await self._changes.commit(_required(request, "version"), _expected(request), keep=keep)
        return weights_pb2.CommitResponse(current=to_version(versions.current), previous=_optional(versions.previous))

    async def Rollback(self, request: weights_pb2.RollbackRequest, context: Any) -> weights_pb2.RollbackResponse:
        versions = await self._changes.rollback(_expected(request))
        return weights_pb2.RollbackResponse(current=to_version(versions.current))

    async def Current(self, request: weights_pb2.CurrentRequest, context: Any) -> weights_pb2.CurrentResponse:
        versions = self._changes.versions
        return weights_pb2.CurrentResponse(
            current=to_version(versions.current),
            previous=_optional(versions.previous),
            prepared=_optional(versions.prepared),
        )

    async def _receive(self, chunks: AsyncIterator[weights_pb2.UploadChunk], folder: Path) -> WeightVersion:
        """Writes what comes to the folder, with the manifest that a trainer would have written beside it.

        Raises:
            RequestError: nothing came, or more than the bound.
        """
        version: WeightVersion | None = None
        adapter: AdapterOf | None = None
        file, size_bytes = folder / WEIGHTS_FILE, 0
        with storage_errors(folder), file.open("wb") as out:
            async for chunk in chunks:
                if version is None:
                    version, adapter = _required(chunk, "version"), _adapter(chunk)
                size_bytes += len(chunk.data)
                self._check_size(size_bytes)
                await asyncio.to_thread(out.write, chunk.data)
        if version is None or size_bytes == 0:
            raise RequestError("upload: a version and the bytes of model.safetensors expected, nothing received")
        manifest = Manifest(version, size_bytes, {}, self._tokenizer_sha256, None, adapter)
        write_json(folder / MANIFEST_FILE, asdict(manifest))
        return version

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_upload_bytes:
            raise RequestError(
                f"upload: more than {self._max_upload_bytes} bytes, which is twice what this policy's weights take; "
                "send weights of the model that it serves"
            )


def folder_of(uri: str) -> Path:
    """The folder that a manifest's URI or a plain path names.

    Raises:
        ModelError: it is no place on a file system.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise ModelError(f"{uri}: weights are read from a folder (a path or file:///…) or brought by Upload")
    return Path(unquote(parts.path) if parts.scheme else uri)


def _required(request: Any, field: str) -> WeightVersion:
    if not request.HasField(field) or not getattr(request, field).sha256:
        raise RequestError(f"{field}: required, with its sha256")
    return from_version(getattr(request, field))


def _adapter(chunk: weights_pb2.UploadChunk) -> AdapterOf | None:
    return AdapterOf(chunk.adapter.base_sha256, chunk.adapter.scaling) if chunk.HasField("adapter") else None


def _expected(request: weights_pb2.CommitRequest | weights_pb2.RollbackRequest) -> WeightVersion | None:
    return from_version(request.expected_current) if request.HasField("expected_current") else None


def _optional(version: WeightVersion | None) -> weights_pb2.WeightVersion | None:
    return None if version is None else to_version(version)


def _timeout_s(context: Any) -> float:
    remaining: float | None = context.time_remaining()
    return PREPARE_TIMEOUT_S if remaining is None else max(0.0, min(remaining, PREPARE_TIMEOUT_S))
