"""The reference service: `rlhf reference`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from rlhf.errors import ModelError, RequestError
from rlhf.models.compute import set_threads
from rlhf.models.folders import start_model
from rlhf.reference.scorer import Item, ReferenceModel
from rlhf.serving.batcher import Batcher, Limits
from rlhf.serving.server import Server, Start, run_server
from rlhf.serving.token_checks import check_count, check_tokenizer, check_tokens
from rlhf.serving.worker_thread import WorkerThread
from rlhf.settings.run import Settings
from rlhf.v1 import reference_pb2, reference_pb2_grpc
from rlhf.wire.records import Floats
from rlhf.wire.tensors import from_ragged, from_tensor, to_ragged

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
        await worker.run(set_threads, reference.threads)
        folder = reference.model or start_model(settings)
        model = await worker.run(ReferenceModel.load, folder, reference.device, reference.dtype)
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


def read_items(request: reference_pb2.LogProbsRequest, max_batch_size: int) -> list[Item]:
    """
    Raises:
        RequestError: no sequences or too many, no temperature, or a sequence with nothing to score.
    """
    sequences = from_ragged(request.token_ids, "token_ids", dtypes="i")
    check_count(len(sequences), "token_ids", max_batch_size)
    temperature = _temperature(request)
    firsts = from_tensor(request.first_scored, "first_scored", dtypes="i", ndim=1)
    if len(firsts) != len(sequences):
        raise RequestError(f"first_scored: {len(firsts)} for {len(sequences)} sequences")
    for index, (tokens, first) in enumerate(zip(sequences, firsts, strict=True)):
        if not 1 <= first < len(tokens):
            raise RequestError(
                f"first_scored: {first} for sequence {index} of {len(tokens)} tokens; from 1, since nothing comes "
                "before token 0, to one less than the length expected"
            )
    return [Item(tokens, int(first), temperature) for tokens, first in zip(sequences, firsts, strict=True)]


def _temperature(request: reference_pb2.LogProbsRequest) -> float:
    if not request.HasField("temperature"):
        raise RequestError("temperature: required; 1.0 gives log-probs of the unscaled logits")
    if not (math.isfinite(request.temperature) and request.temperature > 0):
        raise RequestError(f"temperature: must be > 0, {request.temperature:g} received")
    return request.temperature
