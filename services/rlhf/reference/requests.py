"""What a LogProbsRequest holds, checked for everything that can be told without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import RequestError
from rlhf.serving.token_checks import check_count
from rlhf.v1 import reference_pb2
from rlhf.wire.tensors import from_ragged, from_tensor


@dataclass(frozen=True)
class Item:
    """One sequence of a call."""

    token_ids: NDArray[np.integer[Any]]
    """[T]"""
    first_scored: int
    """1..T - 1: the answer is of tokens [first_scored, T)."""
    temperature: float
    hidden_states: bool = False
    """They are wanted in place of log-probs."""


def read_items(request: reference_pb2.LogProbsRequest, max_batch_size: int) -> list[Item]:
    """
    Raises:
        RequestError: no sequences or too many, no temperature, an unknown kind of answer, or a sequence with nothing to
            score.
    """
    if request.answer not in reference_pb2.Answer.values():
        raise RequestError(f"answer: {request.answer} is none of {reference_pb2.Answer.keys()}")
    wants_hidden_states = request.answer == reference_pb2.ANSWER_HIDDEN_STATES
    sequences = from_ragged(request.token_ids, "token_ids", dtypes="i")
    check_count(len(sequences), "token_ids", max_batch_size)
    temperature = 1.0 if wants_hidden_states else _temperature(request)
    firsts = from_tensor(request.first_scored, "first_scored", dtypes="i", ndim=1)
    if len(firsts) != len(sequences):
        raise RequestError(f"first_scored: {len(firsts)} for {len(sequences)} sequences")
    for index, (tokens, first) in enumerate(zip(sequences, firsts, strict=True)):
        if not 1 <= first < len(tokens):
            raise RequestError(
                f"first_scored: {first} for sequence {index} of {len(tokens)} tokens; from 1, since nothing comes "
                "before token 0, to one less than the length expected"
            )
    return [
        Item(tokens, int(first), temperature, wants_hidden_states)
        for tokens, first in zip(sequences, firsts, strict=True)
    ]


def _temperature(request: reference_pb2.LogProbsRequest) -> float:
    if not request.HasField("temperature"):
        raise RequestError("temperature: required; 1.0 gives log-probs of the unscaled logits")
    if not (math.isfinite(request.temperature) and request.temperature > 0):
        raise RequestError(f"temperature: must be > 0, {request.temperature:g} received")
    return request.temperature
