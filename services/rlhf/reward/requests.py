"""What a ScoreRequest holds, checked for everything that can be told without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import RequestError
from rlhf.serving.token_checks import check_count
from rlhf.v1 import reward_pb2
from rlhf.wire.tensors import from_ragged, from_tensor


@dataclass(frozen=True)
class Texts:
    prompt: str
    completion: str


@dataclass(frozen=True)
class TokenItem:
    token_ids: NDArray[np.integer]
    """[T], prompt and completion."""
    prompt_length: int
    """0..T - 1."""


@dataclass(frozen=True)
class Call:
    """One call's N items: tokens, texts or both."""

    tokens: tuple[TokenItem, ...] | None
    texts: tuple[Texts, ...] | None
    """The items as they were sent as text, or `decoded` beside tokens."""
    tokenizer_sha256: str
    metadata: tuple[Mapping[str, str], ...]
    per_token: bool

    def __len__(self) -> int:
        return len(self.metadata)


def read_call(request: reward_pb2.ScoreRequest, max_batch_size: int) -> Call:
    """
    Raises:
        RequestError: no items or too many, fields that do not fit each other, or an empty completion.
    """
    kind = request.WhichOneof("batch")
    if kind == "tokens":
        tokens, texts = _tokens(request.tokens, max_batch_size), _decoded(request)
    elif kind == "texts":
        tokens, texts = None, _texts(request.texts, max_batch_size)
    else:
        raise RequestError("batch: `tokens` or `texts` expected, neither received")
    count = len(tokens if tokens is not None else texts or ())
    if texts is not None and len(texts) != count:
        raise RequestError(f"decoded: {len(texts)} items beside {count} sequences of tokens")
    return Call(tokens, texts, request.tokens.tokenizer_sha256, _metadata(request, count), request.per_token)


def _tokens(batch: reward_pb2.TokenBatch, max_batch_size: int) -> tuple[TokenItem, ...]:
    sequences = from_ragged(batch.token_ids, "tokens.token_ids", dtypes="i")
    check_count(len(sequences), "tokens", max_batch_size)
    lengths = from_tensor(batch.prompt_lengths, "tokens.prompt_lengths", dtypes="i", ndim=1)
    if len(lengths) != len(sequences):
        raise RequestError(f"tokens.prompt_lengths: {len(lengths)} lengths for {len(sequences)} sequences")
    for index, (tokens, length) in enumerate(zip(sequences, lengths, strict=True)):
        if not 0 <= length < len(tokens):
            raise RequestError(
                f"tokens.prompt_lengths: {length} for sequence {index} of {len(tokens)} tokens; a prompt and at least "
                "one token of completion expected"
            )
    return tuple(TokenItem(tokens, int(length)) for tokens, length in zip(sequences, lengths, strict=True))


def _texts(batch: reward_pb2.TextBatch, max_batch_size: int) -> tuple[Texts, ...]:
    check_count(len(batch.items), "texts", max_batch_size)
    for index, item in enumerate(batch.items):
        if not item.completion:
            raise RequestError(f"texts: the completion of item {index} is empty")
    return tuple(Texts(item.prompt, item.completion) for item in batch.items)


def _decoded(request: reward_pb2.ScoreRequest) -> tuple[Texts, ...] | None:
    """A completion may be empty here: one that is nothing but its end token has no text."""
    if not request.HasField("decoded"):
        return None
    return tuple(Texts(item.prompt, item.completion) for item in request.decoded.items)


def _metadata(request: reward_pb2.ScoreRequest, count: int) -> tuple[Mapping[str, str], ...]:
    if not request.metadata:
        return tuple({} for _ in range(count))
    if len(request.metadata) != count:
        raise RequestError(f"metadata: {len(request.metadata)} for {count} items; one each or none expected")
    return tuple(dict(entry.fields) for entry in request.metadata)
