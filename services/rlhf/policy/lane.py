"""One set of weights, the cache it filled, and the sequences that run on it: the model side of the engine.

A sequence's cache always lacks its newest token. So a prefill computes all tokens but the last and needs no logits, and
the last one goes through the decode step with everyone else's: sampling happens in one place, and the K completions
of a prompt share its prefill by copying rows.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.policy.cache import SlotCache
from rlhf.policy.generation import Generation
from rlhf.policy.sampler import Sampler, SamplerRow
from rlhf.wire.records import Tokens, WeightVersion

ATTENDED_STEP = 16
"""Attended columns are rounded up to a multiple of it, so that shapes repeat."""


class Lane:
    """Row i of the cache belongs to `rows[i]`. Runs in the engine's thread, except `load` on an idle lane."""

    def __init__(self, model: PreTrainedModel, version: WeightVersion) -> None:
        self.model = model
        self.version = version
        self.rows: list[Generation] = []
        self.idle = threading.Event()
        """Set while no sequence runs on these weights."""
        self.idle.set()
        self._cache = SlotCache(model.config.get_text_config(decoder=True).num_hidden_layers)
        self._vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self._device = str(model.device)
        self._batch: _Batch | None = None

    @torch.inference_mode()
    def join(self, joining: Sequence[Generation]) -> None:
        """Takes sequences in, new ones or ones that began on other weights, and fills the cache for them."""
        first = len(self.rows)
        self.rows.extend(joining)
        self._batch = None
        self.idle.clear()
        for generation in joining:
            generation.begin(self.version)
        prefixes = _unique([generation.tokens[:-1] for generation in joining], joining)
        self._prefill([(first + i, prefix) for i, prefix in enumerate(prefixes) if len(prefix)])

    @torch.inference_mode()
    def leave(self, leaving: Collection[Generation]) -> None:
        """Takes sequences out; rows from the end move into the gaps."""
        staying = len(self.rows) - len(leaving)
        gaps = [i for i in range(staying) if self.rows[i] in leaving]
        movers = [i for i in range(staying, len(self.rows)) if self.rows[i] not in leaving]
        if movers:
            self._cache.move(movers, gaps, max(len(self.rows[i].tokens) for i in movers))
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows[gap] = self.rows[mover]
        del self.rows[staying:]
        self._batch = None
        if not self.rows:
            self.idle.set()

    @torch.inference_mode()
    def decode(self) -> tuple[list[int], list[float]]:
        """Samples one token for every row; returns the tokens and their log-probs."""
        if self._batch is None:
            self._batch = _Batch(self.rows, self._vocab_size, self._device)
        batch = self._batch
        self._cache.reserve(len(self.rows), batch.longest)
        attended = min(-(-batch.longest // ATTENDED_STEP) * ATTENDED_STEP, self._cache.columns)
        self._cache.decode(batch.positions, attended)
        logits = self.model(
            input_ids=batch.tokens[:, None],
            position_ids=batch.positions[:, None],
            attention_mask=_decode_mask(batch.positions, attended, self.model.dtype),
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        return batch.advance(logits)

    def load(self, weights: WeightVersion) -> None:
        """Names the weights that were copied into the idle model; what the old ones computed is dropped."""
        self._cache.clear()
        self.version = weights

    def _prefill(self, rows: Sequence[tuple[int, Tokens]]) -> None:
        if not rows:
            return
        prefixes = list({id(prefix): prefix for _, prefix in rows}.values())
        place = {id(prefix): i for i, prefix in enumerate(prefixes)}
        input_ids = self._tensor(_padded(prefixes))
        self._cache.reserve(len(self.rows), input_ids.shape[1] + 1)
        self._cache.prefill(
            self._tensor(np.array([row for row, _ in rows])),
            self._tensor(np.array([place[id(prefix)] for _, prefix in rows])),
        )
        # Padding is on the right, where causal attention keeps it from every real token: no mask is needed.
        positions = torch.arange(input_ids.shape[1], device=self._device)[None].expand_as(input_ids)
        self.model.base_model(input_ids, position_ids=positions, past_key_values=self._cache, use_cache=True)

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


class _Batch:
    """The rows as arrays. Stays while nobody joins or leaves, and advances by one token."""

    def __init__(self, rows: Sequence[Generation], vocab_size: int, device: str) -> None:
        lengths = [len(row.request.prompt) + len(row.response) for row in rows]
        newest = [row.response[-1] if row.response else int(row.request.prompt[-1]) for row in rows]
        self.tokens = torch.tensor(newest, device=device)
        self.positions = torch.tensor(lengths, device=device) - 1
        self.longest = max(lengths)
        self._steps = np.array([len(row.response) for row in rows])
        penalised = [row.request.sampling.repetition_penalty != 1 for row in rows]
        present = [row.tokens if wanted else _NONE for row, wanted in zip(rows, penalised, strict=True)]
        self._sampler = Sampler([_sampler_row(row) for row in rows], present, vocab_size, device)

    def advance(self, logits: Tensor) -> tuple[list[int], list[float]]:
        self.tokens, logprobs = self._sampler.sample(logits, self._steps)
        self.positions = self.positions + 1
        self._steps += 1
        self.longest += 1
        return self.tokens.tolist(), logprobs.tolist()


_NONE: Tokens = np.empty(0, dtype=np.int32)


def _sampler_row(row: Generation) -> SamplerRow:
    request = row.request
    return SamplerRow(
        request.seed, request.sampling, request.logprob_mode, request.stopping.min_new_tokens, row.end_token_ids
    )


def _unique(prefixes: Sequence[Tokens], generations: Sequence[Generation]) -> list[Tokens]:
    """The same array for sequences of one prompt that have sampled nothing yet."""
    first: dict[int, Tokens] = {}
    return [
        prefix if generation.response else first.setdefault(id(generation.request.prompt), prefix)
        for prefix, generation in zip(prefixes, generations, strict=True)
    ]


def _padded(sequences: Sequence[Tokens]) -> NDArray[np.int64]:
    """[N, longest], each sequence filled up with its own last token, which every model knows."""
    padded = np.empty((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
        row[len(sequence) :] = sequence[-1]
    return padded


def _decode_mask(positions: Tensor, attended: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, attended], added to attention scores: 0 up to each row's position, the least number beyond."""
    hidden = torch.arange(attended, device=positions.device) > positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
