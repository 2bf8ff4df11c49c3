"""The reference service on loopback, and what is asked of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.reference.server import SERVICE, starting
from rlhf.reference.settings import ReferenceSettings
from rlhf.serving.client import connect
from rlhf.serving.server import running
from rlhf.settings.run import Settings
from rlhf.v1 import reference_pb2, reference_pb2_grpc
from rlhf.wire.tensors import to_ragged, to_tensor
from support.tiny import tiny_tokenizer

OWN = tokenizer_sha256(tiny_tokenizer())
SEQUENCES = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
FIRSTS = [2, 1, 3]


@asynccontextmanager
async def service(**settings: Any) -> AsyncIterator[Any]:
    """A stub of a running service."""
    reference = ReferenceSettings(**settings)
    async with (
        running("reference", reference, [SERVICE], starting(Settings(reference=reference))) as server,
        connect(server.address, service=SERVICE) as channel,
    ):
        yield reference_pb2_grpc.ReferenceServiceStub(channel)


def request(
    sequences: Sequence[Sequence[int]] = SEQUENCES,
    firsts: Sequence[int] = FIRSTS,
    temperature: float | None = 1.0,
    tokenizer_sha256: str = OWN,
    answer: int = reference_pb2.ANSWER_LOGPROBS,
) -> reference_pb2.LogProbsRequest:
    return reference_pb2.LogProbsRequest(
        token_ids=to_ragged([np.array(sequence, dtype=np.int32) for sequence in sequences], np.int32),
        first_scored=to_tensor(np.array(firsts, dtype=np.int64)),
        temperature=temperature,
        tokenizer_sha256=tokenizer_sha256,
        answer=answer,  # type: ignore[arg-type]
    )
