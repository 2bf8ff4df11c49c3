"""One set of weights, the cache it filled, and the sequences that run on it: the model side of the engine.

A sequence's cache always lacks its newest token. So a prefill computes all tokens but the last and needs no logits, and
the last one goes through the decode step with everyone else's: sampling happens in one place, and the K completions
of a prompt share its prefill by copying rows.

With a `FixedShape` every decode step has the same rows and columns, and every prefill a shape that its prompts decide
each by themselves: what a sequence samples then depends on no other, to the last bit. Fillers take the free places.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.policy.cache import SlotCache
from rlhf.policy.generation import Generation
from rlhf.policy.sampler import Sampler, SamplerRow
from rlhf.serving.fixed_shapes import ROWS, batches
from rlhf.wire.records import LogprobMode, Sampling, Tokens, WeightVersion

ATTENDED_STEP = 16
"""Attended columns are rounded up to a multiple of it, so that shapes repeat."""


@dataclass(frozen=True)
class FixedShape:
    """Of every decode step."""

    rows: int
    columns: int
    """Tokens that each row has room for, and that it attends to."""


class Lane:
    """Row i of the cache belongs to `rows[i]`. Runs in the engine's thread, except `load` on an idle lane."""

    def __init__(self, model: PreTrainedModel, version: WeightVersion, shape: FixedShape | None = None) -> None:
        """
        Args:
            shape: None: as large as the sequences under way need.
        """
        self.shape = shape
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
            self._batch = _Batch(self.rows, self.shape.rows if self.shape else 0, self._vocab_size, self._device)
        batch = self._batch
        attended = self._reserve(batch.longest)
        self._cache.decode(batch.positions, attended)
        logits = self.model(
            input_ids=batch.tokens[:, None],
            position_ids=batch.positions[:, None],
            attention_mask=_decode_mask(batch.positions, attended, self.model.dtype),
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        tokens, logprobs = batch.advance(logits)
        return tokens[: len(self.rows)], logprobs[: len(self.rows)]

    def load(self, weights: WeightVersion) -> None:
        """Names the weights that were copied into the idle model; what the old ones computed is dropped."""
        self._cache.clear()
        self.version = weights

    def _reserve(self, columns: int) -> int:
        """Makes room in the cache; returns how many columns a decode step looks at."""
        if self.shape is not None:
            self._cache.reserve(self.shape.rows, self.shape.columns)
            return self.shape.columns
        self._cache.reserve(len(self.rows), columns)
        return min(-(-columns // ATTENDED_STEP) * ATTENDED_STEP, self._cache.columns)

    def _prefill(self, rows: Sequence[tuple[int, Tokens]]) -> None:
        prefixes = list({id(prefix): prefix for _, prefix in rows}.values())
        for together, shape in self._prefills(prefixes):
            place = {id(prefix): i for i, prefix in enumerate(together)}
            own = [(row, place[id(prefix)]) for row, prefix in rows if id(prefix) in place]
            self._prefill_together(self._tensor(_padded(together, *shape)), own)

    def _prefills(self, prefixes: Sequence[Tokens]) -> Iterator[tuple[Sequence[Tokens], tuple[int, int]]]:
        """Those that share a forward pass, and its shape."""
        lengths = [len(prefix) for prefix in prefixes]
        if self.shape is not None:
            for places, longest in batches(lengths, self.shape.columns, ROWS):
                yield [prefixes[place] for place in places], (ROWS, longest)
        elif prefixes:
            yield prefixes, (len(prefixes), max(lengths))

    def _prefill_together(self, input_ids: Tensor, rows: Sequence[tuple[int, int]]) -> None:
        """
        Args:
            input_ids: [N, T], a prefix in each row.
            rows: of the cache, each with the row of `input_ids` that it takes.
        """
        self._reserve(input_ids.shape[1] + 1)
        own, sources = np.array(rows).T
        self._cache.prefill(self._tensor(own), self._tensor(sources))
        # Padding is on the right, where causal attention keeps it from every real token: no mask is needed.
        positions = torch.arange(input_ids.shape[1], device=self._device)[None].expand_as(input_ids)
        self.model.base_model(input_ids, position_ids=positions, past_key_values=self._cache, use_cache=True)

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


class _Batch:
    """The rows as arrays. Stays while nobody joins or leaves, and advances by one token."""

    def __init__(self, rows: Sequence[Generation], at_least: int, vocab_size: int, device: str) -> None:
        """
        Args:
            at_least: that many rows; fillers follow the real ones.
        """
        fillers = max(0, at_least - len(rows))
        lengths = [len(row.request.prompt) + len(row.response) for row in rows] + [1] * fillers
        newest = [row.response[-1] if row.response else int(row.request.prompt[-1]) for row in rows] + [0] * fillers
        self.tokens = torch.tensor(newest, device=device)
        self.positions = torch.tensor(lengths, device=device) - 1
        self.longest = max(lengths)
        self._steps = np.array([*(len(row.response) for row in rows), *[0] * fillers])
        penalised = [row.request.sampling.repetition_penalty != 1 for row in rows]
        present = [row.tokens if wanted else _NONE for row, wanted in zip(rows, penalised, strict=True)]
        sampled = [*(_sampler_row(row) for row in rows), *[_FILLER] * fillers]
        self._sampler = Sampler(sampled, [*present, *[_NONE] * fillers], vocab_size, device)

    def advance(self, logits: Tensor) -> tuple[list[int], list[float]]:
        self.tokens, logprobs = self._sampler.sample(logits, self._steps)
        self.positions = self.positions + 1
        self._steps += 1
        self.longest += 1
        return self.tokens.tolist(), logprobs.tolist()


_NONE: Tokens = np.empty(0, dtype=np.int32)
_FILLER = SamplerRow(0, Sampling(), LogprobMode.TEMPERATURE, 0, frozenset())


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


def _padded(sequences: Sequence[Tokens], rows: int, columns: int) -> NDArray[np.int64]:
    """[rows, columns], each sequence filled up with its own last token, and rows to spare with token 0: every model
    knows them."""
    padded = np.zeros((rows, columns), dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=False):
        row[: len(sequence)] = sequence
        row[len(sequence) :] = sequence[-1]
    return padded


def _decode_mask(positions: Tensor, attended: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, attended], added to attention scores: 0 up to each row's position, the least number beyond."""
    hidden = torch.arange(attended, device=positions.device) > positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
