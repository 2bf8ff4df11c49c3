"""A key-value cache with one row per sequence, so that sequences join and leave between decode steps.

Position p of a sequence lies at column p of its row, whatever its neighbours are doing:

    row 0   k k k k k k . .      length 6
    row 1   k k . . . . . .      length 2
    row 2   k k k k k k k k      length 8: the step attends to 8 columns, and a mask hides the rest of rows 0 and 1

Live rows are the first B, so a step works on views and copies nothing; a leaving sequence's place is taken by the last
row (`move`). Storage grows by doubling and is never shared between two sets of weights. Left out: paging, and attention
windows shorter than the context (`check_cacheable` refuses models that need them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from rlhf.errors import ModelError

COLUMNS_AT_FIRST = 64


class SlotCache(Cache):
    """Rows of keys and values for every layer of one model. Belongs to the thread that runs the model."""

    def __init__(self, num_layers: int) -> None:
        self._slots = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._slots))
        self.rows = 0
        self.columns = 0
        self.prefilled_rows: Tensor | None = None
        """int64 [R], rows being prefilled; None while decoding."""
        self.sources = torch.empty(0, dtype=torch.int64)
        """int64 [R], which prompt of the batch each of them takes: several rows may take the same one."""
        self.positions = torch.empty(0, dtype=torch.int64)
        """int64 [B], the column that each row's next token goes to."""
        self.attended = 0
        """Columns that the decode step looks at."""

    def reserve(self, rows: int, columns: int) -> None:
        """Makes room, keeping what is there."""
        if rows > self.rows or columns > self.columns:
            self.rows = _grown(self.rows, rows, 1)
            self.columns = _grown(self.columns, columns, COLUMNS_AT_FIRST)
            for layer in self._slots:
                layer.grow()

    def prefill(self, rows: Tensor, sources: Tensor) -> None:
        """The next forward pass brings whole prompts, from position 0."""
        self.prefilled_rows, self.sources = rows, sources

    def decode(self, positions: Tensor, attended: int) -> None:
        """The next forward pass brings one token for each of the first B rows."""
        self.prefilled_rows, self.positions, self.attended = None, positions, attended
        for layer in self._slots:
            layer.forget_cells()

    def move(self, sources: list[int], targets: list[int], columns: int) -> None:
        """Copies the first columns of rows onto other rows."""
        for layer in self._slots:
            layer.move(sources, targets, columns)

    def clear(self) -> None:
        """Gives the memory back; what new weights would compute differs from what lies here."""
        self.rows = self.columns = 0
        for layer in self._slots:
            layer.reset()


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, columns, head size], in the form `transformers` models write to."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._cells: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not uninitialised memory: a hidden column has weight 0, and 0 × NaN would still be NaN.
        shape = (self._cache.rows, key_states.shape[1], self._cache.columns)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self._cache.prefilled_rows is not None:
            self._store_prompts(self.keys, key_states)
            self._store_prompts(self.values, value_states)
            return key_states, value_states
        batch, attended = key_states.shape[0], self._cache.attended
        self._store_tokens(self.keys, key_states)
        self._store_tokens(self.values, value_states)
        return self.keys[:batch, :, :attended], self.values[:batch, :, :attended]

    def _store_prompts(self, store: Tensor, states: Tensor) -> None:
        # What padding leaves behind a shorter prompt is hidden until the sequence's own tokens replace it.
        assert self._cache.prefilled_rows is not None
        columns = store[:, :, : states.shape[2]]
        columns.index_copy_(0, self._cache.prefilled_rows, states.index_select(0, self._cache.sources))

    def _store_tokens(self, store: Tensor, states: Tensor) -> None:
        if self._cells is None:
            batch, heads, columns = states.shape[0], store.shape[1], store.shape[2]
            lines = torch.arange(batch * heads, device=store.device)
            self._cells = lines * columns + self._cache.positions.repeat_interleave(heads)
        store.view(-1, store.shape[3]).index_copy_(0, self._cells, states.reshape(-1, store.shape[3]))

    def forget_cells(self) -> None:
        self._cells = None

    def grow(self) -> None:
        if self.keys is None or self.values is None:
            return
        self.keys = self._larger(self.keys)
        self.values = self._larger(self.values)

    def _larger(self, store: Tensor) -> Tensor:
        larger = store.new_zeros(self._cache.rows, store.shape[1], self._cache.columns, store.shape[3])
        larger[: store.shape[0], :, : store.shape[2]] = store
        return larger

    def move(self, sources: list[int], targets: list[int], columns: int) -> None:
        for store in (self.keys, self.values):
            if store is not None:
                store[targets, :, :columns] = store[sources, :, :columns]

    def reset(self) -> None:
        self.keys = self.values = self._cells = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        return 0  # asked before a prefill only: positions are always given

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked before a prefill only: decoding brings its own mask

    def get_max_length(self) -> int:
        return -1


def check_cacheable(model: PreTrainedModel) -> int:
    """The model's context in tokens, over all of which a `SlotCache` can stand for its memory.

    Raises:
        ModelError: attention over all earlier tokens is not all that the model remembers, or it names no context.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ModelError(f"{name}: encoder-decoder models cannot be served; give a decoder-only one")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ModelError(f"{name}: attention {config._attn_implementation!r} has no masks per row; load it as sdpa")
    if getattr(config, "alibi", False):
        raise ModelError(
            f"{name}: its positions (ALiBi) are read off a mask that rows of their own lengths do not have"
        )
    windows = []
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            windows.append(layer.sliding_window)
        elif type(layer) is not DynamicLayer:
            raise ModelError(
                f"{name}: remembers by {type(layer).__name__}; only attention over all tokens can be served"
            )
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 2:
        raise ModelError(f"{name}: its config names no max_position_embeddings, so its context is not known")
    if windows and min(windows) < context:
        raise ModelError(f"{name}: an attention window of {min(windows)} tokens is shorter than its context, {context}")
    return context


def _grown(size: int, needed: int, at_first: int) -> int:
    """Doubled until it fits, so that growing costs a constant per token."""
    grown = max(size, at_first)
    while grown < needed:
        grown *= 2
    return grown
