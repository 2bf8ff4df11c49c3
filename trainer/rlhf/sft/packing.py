"""Documents packed end to end into rows of one length, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf.sft.tokens import IGNORED, TokenArray, TokenBatch


def token_stream(documents: Sequence[TokenArray], end_token_id: int) -> TokenArray:
    """All documents, each ended by the end token, after one end token: what stands before any first token."""
    ended = np.concatenate([np.append(document, end_token_id) for document in documents])
    return np.concatenate([[end_token_id], ended]).astype(np.int32)


class PackedRows:
    """Rows of `length` predicted tokens each, in a new order every epoch. What does not fill the last row is left out.

    Args:
        stream: [N] tokens, N > length.
    """

    def __init__(self, stream: TokenArray, length: int, batch_size: int, seed: int) -> None:
        count = (len(stream) - 1) // length
        if count == 0:
            raise ValueError(f"{len(stream)} tokens do not fill one row of {length}")
        starts = np.arange(count)[:, None] * length
        self._rows = stream[starts + np.arange(length + 1)]
        self._batch_size = batch_size
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(count))

    def micro_batch(self, index: int) -> TokenBatch:
        places = np.arange(index * self._batch_size, (index + 1) * self._batch_size)
        epochs, within = np.divmod(places, len(self._rows))
        chosen = np.array([self._order(int(epoch))[place] for epoch, place in zip(epochs, within, strict=True)])
        return _batch(self._rows[chosen])


def stream_in_order(stream: TokenArray, length: int, batch_size: int) -> Iterator[TokenBatch]:
    """The whole stream once; every token but the first is predicted exactly once."""
    count = -(-(len(stream) - 1) // length)
    padded = np.full(count * length + 1, IGNORED, dtype=np.int32)
    padded[: len(stream)] = stream
    rows = padded[np.arange(count)[:, None] * length + np.arange(length + 1)]
    for start in range(0, count, batch_size):
        yield _batch(rows[start : start + batch_size])


def _batch(rows: NDArray[np.int32]) -> TokenBatch:
    tokens = torch.from_numpy(rows.astype(np.int64))
    return TokenBatch(tokens[:, :-1].clamp_min(0), tokens[:, 1:])
