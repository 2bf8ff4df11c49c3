"""Hidden states and the output layer, as a client sees them: together they are the service's own distribution."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from rlhf import errors
from rlhf.models.causal import save_model
from rlhf.reference import scorer
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.serving.client import call, stream
from rlhf.v1 import reference_pb2, tensor_pb2
from rlhf.wire.blobs import read_blob
from rlhf.wire.records import Blob, HiddenStates
from rlhf.wire.tensors import from_hidden_states, from_ragged
from support.reference import FIRSTS, SEQUENCES, request, service
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer

HIDDEN_STATES = reference_pb2.ANSWER_HIDDEN_STATES
NUMBERS = {"float32": tensor_pb2.DTYPE_FLOAT32, "bfloat16": tensor_pb2.DTYPE_BFLOAT16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm_folder(tmp_path_factory.mktemp("hidden") / "model")


async def ask(stub: Any, *args: Any, **kwargs: Any) -> list[HiddenStates]:
    response = await call(stub.LogProbs, request(*args, answer=HIDDEN_STATES, **kwargs), timeout_s=20)
    assert not response.HasField("logprobs")
    return [from_hidden_states(message, "hidden_states") for message in response.hidden_states]


async def head(stub: Any) -> tuple[Any, bytes]:
    first, *parts = [part async for part in stream(stub.Head, reference_pb2.HeadRequest(), timeout_s=20)]
    assert all(0 < len(part.data) <= 2**20 for part in parts)
    return first.info, b"".join(part.data for part in parts)


def tensor(data: bytes, dtype: str, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(*shape)


def logprobs(states: Tensor, weight: Tensor, bias: Tensor | None, labels: list[int], temperature: float) -> Tensor:
    """By definition, in float64."""
    logits = states.double() @ weight.double().T + (0 if bias is None else bias.double())
    return torch.log_softmax(logits / temperature, -1)[torch.arange(len(labels)), torch.tensor(labels)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_times_head_are_the_services_own_log_probs(folder: Path, dtype: str) -> None:
    async def scenario() -> None:
        async with service(model=folder, dtype=dtype) as stub:
            states, (info, data) = await ask(stub, temperature=None), await head(stub)
            response = await call(stub.LogProbs, request(temperature=0.7), timeout_s=20)
        assert (info.dtype, info.vocab_size, info.hidden_size, info.has_bias) == (NUMBERS[dtype], 280, 16, False)
        assert (info.size_bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert info.model_sha256 == response.model_sha256 != ""
        weight = tensor(data, dtype, 280, 16)
        own = from_ragged(response.logprobs, "logprobs")
        for one, sequence, first, expected in zip(states, SEQUENCES, FIRSTS, own, strict=True):
            assert (one.dtype, one.shape) == (dtype, (len(sequence) - first, 16))
            assert isinstance(one.content, bytes)
            found = logprobs(tensor(one.content, dtype, *one.shape), weight, None, sequence[first:], 0.7)
            assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)

    asyncio.run(scenario())


def test_a_head_with_a_bias_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "HEAD_PART_BYTES", 1000)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    reference = reference_model(model)
    sequence = np.arange(3, 12, dtype=np.int32)
    (found,) = reference.logprobs([Item(sequence, 4, 0.7)])
    (states,) = reference.forward([Item(sequence, 4, 1.0, hidden_states=True)])
    assert isinstance(states, HiddenStates)
    assert isinstance(states.content, bytes)
    parts = list(reference.head.parts())
    assert {len(part) for part in parts[:3]} == {1000}
    data, shape = b"".join(parts), reference.head.shape
    assert (shape.has_bias, shape.size_bytes, shape.sha256) == (True, len(data), hashlib.sha256(data).hexdigest())
    numbers = tensor(data, "float32", 60 * 16 + 60)
    expected = logprobs(
        tensor(states.content, "float32", 5, 16), numbers[:960].view(60, 16), numbers[960:], sequence[4:].tolist(), 0.7
    )
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def reference_model(model: PreTrainedModel) -> ReferenceModel:
    return ReferenceModel(model, model_sha256="", tokenizer_sha256="")


def test_a_batch_may_mix_answers_and_temperatures() -> None:
    reference = reference_model(tiny_lm())
    tokens = [np.arange(start, start + length, dtype=np.int32) for start, length in ((3, 9), (50, 5), (80, 7), (9, 4))]
    items = [
        Item(tokens[0], 2, 2.0),
        Item(tokens[1], 1, 1.0, hidden_states=True),
        Item(tokens[2], 3, 0.5),
        Item(tokens[3], 1, 2.0),
    ]
    together = reference.forward(items)
    for item, answer in zip(items, together, strict=True):
        (alone,) = reference.forward([item])
        if isinstance(answer, HiddenStates):
            assert isinstance(alone, HiddenStates)
            assert isinstance(alone.content, bytes)
            assert isinstance(answer.content, bytes)
            assert item.hidden_states
            assert answer.shape == alone.shape == (4, 16)
            np.testing.assert_allclose(
                tensor(answer.content, "float32", 4, 16), tensor(alone.content, "float32", 4, 16), atol=1e-5
            )
        else:
            assert not item.hidden_states
            np.testing.assert_allclose(answer, alone, atol=1e-5)
    np.testing.assert_allclose(reference.logprobs(items)[1], reference.logprobs([items[1]])[0], atol=1e-5)


def test_calls_for_either_answer_share_a_batch(folder: Path) -> None:
    async def scenario() -> None:
        async with service(model=folder, max_delay_ms=100) as stub:
            states, response = await asyncio.gather(ask(stub), call(stub.LogProbs, request(), timeout_s=20))
            alone = await ask(stub)
        assert not response.hidden_states
        assert [len(row) for row in from_ragged(response.logprobs, "logprobs")] == [4, 2, 1]
        assert [one.shape for one in states] == [(4, 16), (2, 16), (1, 16)]
        assert [hashlib.sha256(contents(one)).hexdigest() for one in states] == [
            hashlib.sha256(contents(one)).hexdigest() for one in alone
        ]

    asyncio.run(scenario())


def contents(one: HiddenStates) -> bytes:
    assert isinstance(one.content, bytes)
    return one.content


def test_large_states_are_blobs(folder: Path, tmp_path: Path) -> None:
    """The sequences' states take 256, 128 and 64 bytes."""

    async def scenario() -> None:
        async with service(model=folder) as stub:
            inline = await ask(stub)
        async with service(model=folder, blobs=tmp_path / "blobs", inline_bytes=128) as stub:
            large, *small = await ask(stub)
        assert small == inline[1:]
        assert isinstance(large.content, Blob)
        assert replace(large, content=read_blob(tmp_path / "blobs", large.content)) == inline[0]
        assert [path.as_uri() for path in (tmp_path / "blobs").iterdir()] == [large.content.uri]

    asyncio.run(scenario())


def test_states_for_which_the_message_has_no_room_are_blobs(folder: Path, tmp_path: Path) -> None:
    """200 sequences of 63 states of 64 bytes: 0.8 MB, all of which may be inline, and messages of 1 MiB at most."""
    sequences = [[*range(index, index + 64)] for index in range(200)]

    async def scenario() -> None:
        async with service(model=folder, blobs=tmp_path, max_message_mib=1) as stub:
            response = await call(stub.LogProbs, request(sequences, [1] * 200, answer=HIDDEN_STATES), timeout_s=30)
        assert response.ByteSize() < 2**20 * 3 // 4
        states = [from_hidden_states(message, "hidden_states") for message in response.hidden_states]
        assert {type(one.content) for one in states} == {bytes, Blob}
        assert all(len(read_blob(tmp_path, one.content)) == 4032 for one in states if isinstance(one.content, Blob))

    asyncio.run(scenario())


def test_blobs_that_cannot_be_written_are_said_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def scenario() -> None:
        async with service(model=folder, blobs=tmp_path / "file", inline_bytes=1) as stub:
            with pytest.raises(errors.StorageError, match=r"name another folder in reference\.blobs"):
                await ask(stub)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("answer", "what"), [(HIDDEN_STATES, "hidden states"), (reference_pb2.ANSWER_LOGPROBS, "log-probs")]
)
def test_what_is_not_finite_is_refused(tmp_path: Path, answer: int, what: str) -> None:
    """A position that only long sequences reach is damaged."""
    model = tiny_lm("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[6] = torch.nan
    save_model(model, tiny_tokenizer(), tmp_path)

    async def scenario() -> None:
        async with service(model=tmp_path) as stub:
            await call(stub.LogProbs, request([[5] * 6], [1], answer=answer), timeout_s=20)
            with pytest.raises(
                errors.ModelError, match=f"{what} of sequence 0 are not finite; its weights are damaged"
            ):
                await call(stub.LogProbs, request([[5] * 8], [5], answer=answer), timeout_s=20)

    asyncio.run(scenario())
