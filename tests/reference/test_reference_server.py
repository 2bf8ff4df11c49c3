"""The reference service on loopback, with a tiny language model, called through its proto."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf import errors
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.reference.server import SERVICE, starting
from rlhf.reference.settings import ReferenceSettings
from rlhf.serving.client import call, connect, connect_sync
from rlhf.serving.server import running
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from rlhf.v1 import reference_pb2, reference_pb2_grpc
from rlhf.wire.tensors import from_ragged
from support.reference import FIRSTS, OWN, SEQUENCES, request, service
from support.reflection import ReflectedService
from support.tiny import tiny_lm_folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm_folder(tmp_path_factory.mktemp("reference") / "model", request.param)


async def logprobs(stub: Any, *args: Any, **kwargs: Any) -> list[list[float]]:
    response = await call(stub.LogProbs, request(*args, **kwargs), timeout_s=20)
    return [row.tolist() for row in from_ragged(response.logprobs, "logprobs")]


def naive(folder: Path, sequence: Sequence[int], first: int, temperature: float) -> list[float]:
    """log_softmax of one unpadded sequence in float64, token by token."""
    logits = load_causal_lm(folder)(input_ids=torch.tensor([list(sequence)])).logits[0].detach().double()
    log_p = torch.log_softmax(logits / temperature, -1)
    return [log_p[t - 1, sequence[t]].item() for t in range(first, len(sequence))]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_logprobs_are_the_models_own(folder: Path, temperature: float) -> None:
    async def scenario() -> None:
        async with service(model=folder) as stub:
            rows = await logprobs(stub, temperature=temperature)
        for row, sequence, first in zip(rows, SEQUENCES, FIRSTS, strict=True):
            assert row == pytest.approx(naive(folder, sequence, first, temperature), abs=1e-4)

    asyncio.run(scenario())


def test_calls_with_different_temperatures_share_a_batch(folder: Path) -> None:
    async def scenario() -> None:
        async with service(model=folder, max_delay_ms=100) as stub:
            warm, cold = await asyncio.gather(
                logprobs(stub, SEQUENCES[:1], [1], 2.0), logprobs(stub, SEQUENCES[:1], [1], 0.5)
            )
        assert warm[0] == pytest.approx(naive(folder, SEQUENCES[0], 1, 2.0), abs=1e-4)
        assert cold[0] == pytest.approx(naive(folder, SEQUENCES[0], 1, 0.5), abs=1e-4)

    asyncio.run(scenario())


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(folder: Path) -> None:
    sequences = [list(range(3, 4 + n)) for n in range(1, 9)]

    async def scenario() -> None:
        async with service(model=folder, max_batch_tokens=20, max_delay_ms=0) as stub:
            alone = [(await logprobs(stub, [sequence], [1]))[0] for sequence in sequences]
            together = await logprobs(stub, sequences, [1] * len(sequences))
        assert [len(row) for row in together] == list(range(1, 9))
        for one, other in zip(alone, together, strict=True):
            assert other == pytest.approx(one, abs=1e-5)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (request([], []), errors.RequestError, "at least one item"),
        (request([[1, 2]] * 6, [1] * 6), errors.RequestError, "6 items, and max_batch_size is 5"),
        (request(temperature=None), errors.RequestError, "temperature: required"),
        (request(temperature=0.0), errors.RequestError, "temperature: must be > 0, 0 received"),
        (request(temperature=-1.0), errors.RequestError, "must be > 0, -1 received"),
        (request(temperature=float("nan")), errors.RequestError, "must be > 0, nan received"),
        (request(temperature=float("inf")), errors.RequestError, "must be > 0, inf received"),
        (request([[1, 2]], [0]), errors.RequestError, "first_scored: 0 for sequence 0 of 2 tokens"),
        (request([[1, 2]], [2]), errors.RequestError, "first_scored: 2 for sequence 0 of 2 tokens"),
        (request([[1, 2]], [1, 1]), errors.RequestError, "first_scored: 2 for 1 sequences"),
        (request([[1, 280]], [1]), errors.RequestError, "token 280, and the vocabulary ends at 279"),
        (request([[1, -5]], [1]), errors.RequestError, "token -5"),
        (request([[1] * 65], [1]), errors.RequestError, "65 tokens and the model's context is 64"),
        (request([[1] * 41], [1]), errors.RequestError, "41 tokens, and max_batch_tokens is 40"),
        (request(tokenizer_sha256="f" * 64), errors.TokenizerMismatch, "made by tokenizer ffffffffffff"),
        (request(answer=7), errors.RequestError, "answer: 7 is none of .*ANSWER_HIDDEN_STATES"),
        (reference_pb2.LogProbsRequest(), errors.RequestError, "token_ids.values: a tensor is required"),
    ],
)
def test_a_request_that_cannot_be_answered(
    folder: Path, bad: reference_pb2.LogProbsRequest, error: type[errors.RlhfError], says: str
) -> None:
    async def scenario() -> None:
        async with service(model=folder, max_batch_size=5, max_batch_tokens=40) as stub:
            with pytest.raises(error, match=says):
                await call(stub.LogProbs, bad, timeout_s=20)

    asyncio.run(scenario())


def test_info_and_hashes(folder: Path) -> None:
    async def scenario() -> None:
        async with service(model=folder) as stub:
            info = await call(stub.Info, reference_pb2.ReferenceInfoRequest(), timeout_s=20)
            response = await call(stub.LogProbs, request(tokenizer_sha256=""), timeout_s=20)
        assert (info.vocab_size, info.max_context_tokens, info.tokenizer_sha256) == (280, 64, OWN)
        assert info.hidden_size == 16
        assert info.model_sha256 == response.model_sha256 == weights_sha256(folder)

    asyncio.run(scenario())


def test_a_client_made_from_reflection_alone(folder: Path) -> None:
    def with_reflection(address: str) -> dict[str, Any]:
        int32, int64 = "DTYPE_INT32", "DTYPE_INT64"
        with connect_sync(address) as channel:
            return ReflectedService(channel, SERVICE).call(
                "LogProbs",
                {
                    "token_ids": {"values": packed([5, 6, 7], int32), "cu_seqlens": packed([0, 3], int64)},
                    "first_scored": packed([1], int64),
                    "temperature": 1.0,
                },
            )

    async def scenario() -> None:
        settings = Settings(reference=ReferenceSettings(model=folder))
        async with running("reference", settings.reference, [SERVICE], starting(settings)) as server:
            response = await asyncio.to_thread(with_reflection, server.address)
        values = np.frombuffer(base64.b64decode(response["logprobs"]["values"]["data"]), "<f4")
        assert values.tolist() == pytest.approx(naive(folder, [5, 6, 7], 1, 1.0), abs=1e-4)

    asyncio.run(scenario())


def packed(numbers: list[int], dtype: str) -> dict[str, Any]:
    data = np.array(numbers, "<i4" if dtype == "DTYPE_INT32" else "<i8").tobytes()
    return {"dtype": dtype, "shape": [len(numbers)], "data": base64.b64encode(data).decode()}


def test_without_a_model_it_takes_what_the_policy_starts_from(tmp_path: Path) -> None:
    settings = Settings(run=RunSettings(folder=tmp_path, name="one"))
    tiny_lm_folder(settings.paths.pretrained)

    async def scenario() -> None:
        async with (
            running("reference", settings.reference, [SERVICE], starting(settings)) as server,
            connect(server.address) as channel,
        ):
            stub = reference_pb2_grpc.ReferenceServiceStub(channel)
            info = await call(stub.Info, reference_pb2.ReferenceInfoRequest(), timeout_s=20)
        assert info.model_sha256 == weights_sha256(settings.paths.pretrained)

    asyncio.run(scenario())


def test_a_start_that_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(model=tmp_path / "nowhere"):
            pass

    with pytest.raises(errors.ModelError, match="nowhere"):
        asyncio.run(scenario())
