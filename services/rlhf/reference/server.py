"""The reference service: `rlhf reference`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlhf.errors import ModelError
from rlhf.models.folders import start_model
from rlhf.reference.requests import Item, read_items
from rlhf.serving.batcher import Batcher, Limits
from rlhf.serving.fixed_shapes import LENGTH_STEP, ROWS, check_alike, in_fixed_shapes
from rlhf.serving.server import Server, Start, run_server
from rlhf.serving.token_checks import check_tokenizer, check_tokens
from rlhf.serving.worker_thread import WorkerThread
from rlhf.settings.run import Settings
from rlhf.v1 import reference_pb2, reference_pb2_grpc, tensor_pb2
from rlhf.wire.blobs import write_blob
from rlhf.wire.records import Floats, HiddenStates
from rlhf.wire.tensors import finite, to_hidden_states, to_ragged

if TYPE_CHECKING:
    from rlhf.reference.scorer import ReferenceModel

SERVICE = "rlhf.v1.ReferenceService"


def run(settings: Settings) -> None:
    """Serves until SIGTERM."""
    run_server("reference", settings.reference, [SERVICE], starting(settings))


def starting(settings: Settings) -> Start:
    """How the service starts on a server."""

    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        reference = settings.reference
        worker = WorkerThread("reference")
        folder = reference.model or start_model(settings)
        model = await worker.run(_load, folder, reference.device, reference.dtype, reference.threads)
        limits = Limits(
            reference.max_batch_size,
            reference.max_batch_tokens,
            reference.max_waiting_items,
            reference.max_delay_ms / 1000,
        )
        forward = await worker.run(_repeatable, model) if settings.run.deterministic else model.forward
        batcher = Batcher(worker, forward, limits, length=lambda item: len(item.token_ids))
        async with batcher.running(server.fail):
            servicer = ReferenceServicer(model, batcher, settings)
            server.register(reference_pb2_grpc.add_ReferenceServiceServicer_to_server, servicer)
            await server.set_ready(SERVICE, True)
            yield
        worker.close()

    return start


class Answering(Protocol):
    """What is asked of the batcher."""

    async def submit(self, items: Sequence[Item], /) -> Sequence[Floats | HiddenStates]: ...


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    def __init__(self, model: ReferenceModel, batcher: Answering, settings: Settings) -> None:
        self._model = model
        self._batcher = batcher
        self._settings = settings.reference
        self._blobs = settings.reference.blobs or settings.paths.blobs
        self._max_tokens = model.max_context_tokens or settings.reference.max_batch_tokens

    async def LogProbs(self, request: reference_pb2.LogProbsRequest, context: Any) -> reference_pb2.LogProbsResponse:
        check_tokenizer(request.tokenizer_sha256, self._model.tokenizer_sha256, "token_ids")
        items = read_items(request, self._settings.max_batch_size)
        check_tokens(
            [item.token_ids for item in items],
            "token_ids",
            vocab_size=self._model.vocab_size,
            max_tokens=self._max_tokens,
        )
        answers = await self._batcher.submit(items)
        if request.answer == reference_pb2.ANSWER_HIDDEN_STATES:
            states = [answer for answer in answers if isinstance(answer, HiddenStates)]
            # In a thread, because these are megabytes to look through, hash and write to a disk.
            sent = await asyncio.to_thread(self._sent, states)
            return reference_pb2.LogProbsResponse(hidden_states=sent, model_sha256=self._model.model_sha256)
        logprobs = [answer for answer in answers if not isinstance(answer, HiddenStates)]
        _require_finite("log-probs", [bool(np.isfinite(row).all()) for row in logprobs])
        return reference_pb2.LogProbsResponse(
            logprobs=to_ragged(logprobs, np.float32), model_sha256=self._model.model_sha256
        )

    async def Head(self, request: reference_pb2.HeadRequest, context: Any) -> AsyncIterator[reference_pb2.HeadPart]:
        shape = await asyncio.to_thread(lambda: self._model.head.shape)
        yield reference_pb2.HeadPart(
            info=reference_pb2.HeadInfo(
                dtype=tensor_pb2.DType.Value(f"DTYPE_{shape.dtype.upper()}"),
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                has_bias=shape.has_bias,
                size_bytes=shape.size_bytes,
                sha256=shape.sha256,
                model_sha256=self._model.model_sha256,
            )
        )
        parts = self._model.head.parts()
        while part := await asyncio.to_thread(next, parts, b""):
            yield reference_pb2.HeadPart(data=part)

    async def Info(
        self, request: reference_pb2.ReferenceInfoRequest, context: Any
    ) -> reference_pb2.ReferenceInfoResponse:
        return reference_pb2.ReferenceInfoResponse(
            model_sha256=self._model.model_sha256,
            tokenizer_sha256=self._model.tokenizer_sha256,
            vocab_size=self._model.vocab_size,
            max_context_tokens=self._max_tokens,
            max_batch_tokens=self._settings.max_batch_tokens,
            dtype=self._settings.dtype,
            device=self._settings.device,
            hidden_size=self._model.head.hidden_size,
        )

    def _sent(self, states: Sequence[HiddenStates]) -> list[tensor_pb2.Tensor]:
        """Large ones as blobs, and those for which the message has no room.

        Raises:
            ModelError: one is not finite.
            StorageError: a blob could not be written.
        """
        _require_finite("hidden states", [finite(one) for one in states])
        room_bytes = self._settings.max_message_mib * 2**20 // 2
        sent = []
        for one in states:
            assert isinstance(one.content, bytes)
            size_bytes = len(one.content)
            if size_bytes <= min(self._settings.inline_bytes, room_bytes):
                room_bytes -= size_bytes
            else:
                one = replace(one, content=write_blob(self._blobs, one.content))
            sent.append(to_hidden_states(one))
        return sent


def _require_finite(what: str, finite: Sequence[bool]) -> None:
    for index, is_finite in enumerate(finite):
        if not is_finite:
            raise ModelError(
                f"the reference's {what} of sequence {index} are not finite; its weights are damaged, or too large for "
                "the service's dtype"
            )


def _repeatable(model: ReferenceModel) -> Callable[[Sequence[Item]], list[Floats | HiddenStates]]:
    """Its forward pass in fixed shapes.

    Raises:
        SettingsError: they are not enough on this machine.
    """
    model.apart = True
    forward = in_fixed_shapes(
        model.forward, length=lambda item: len(item.token_ids), filler=_filler, longest=model.max_context_tokens
    )
    answers = forward([_filler(LENGTH_STEP // 2)] * (ROWS - 2))
    check_alike([row.tobytes() for row in answers if not isinstance(row, HiddenStates)], "the reference")
    return forward


def _filler(tokens: int) -> Item:
    return Item(np.zeros(tokens, dtype=np.int32), 1, 1.0)


def _load(folder: Path, device: str, dtype: str, threads: int) -> ReferenceModel:
    # Imported here, so that the port is bound and health answers while torch loads.
    from rlhf.reference.scorer import ReferenceModel

    return ReferenceModel.load(folder, device, dtype, threads)
