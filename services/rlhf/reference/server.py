"""The reference service: `rlhf reference`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.errors import ModelError
from rlhf.models.folders import start_model
from rlhf.reference.requests import Item, read_items
from rlhf.serving.batcher import Batcher, Limits
from rlhf.serving.server import Server, Start, run_server
from rlhf.serving.token_checks import check_tokenizer, check_tokens
from rlhf.serving.worker_thread import WorkerThread
from rlhf.settings.run import Settings
from rlhf.v1 import reference_pb2, reference_pb2_grpc
from rlhf.wire.records import Floats
from rlhf.wire.tensors import to_ragged

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
        batcher = Batcher(worker, model.forward, limits, length=lambda item: len(item.token_ids))
        async with batcher.running(server.fail):
            servicer = ReferenceServicer(model, batcher, settings)
            server.register(reference_pb2_grpc.add_ReferenceServiceServicer_to_server, servicer)
            await server.set_ready(SERVICE, True)
            yield
        worker.close()

    return start


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    def __init__(self, model: ReferenceModel, batcher: Batcher[Item, Floats], settings: Settings) -> None:
        self._model = model
        self._batcher = batcher
        self._settings = settings.reference
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
        logprobs = await self._batcher.submit(items)
        for index, row in enumerate(logprobs):
            if not np.isfinite(row).all():
                raise ModelError(
                    f"the reference's log-probs of sequence {index} are not finite; its weights are damaged, or too "
                    "large for the service's dtype"
                )
        return reference_pb2.LogProbsResponse(
            logprobs=to_ragged(logprobs, np.float32), model_sha256=self._model.model_sha256
        )

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
        )


def _load(folder: Path, device: str, dtype: str, threads: int) -> ReferenceModel:
    # Imported here, so that the port is bound and health answers while torch loads.
    from rlhf.reference.scorer import ReferenceModel

    return ReferenceModel.load(folder, device, dtype, threads)
