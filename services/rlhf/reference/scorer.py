"""The frozen initial model: log-probs of given tokens, or the hidden states and the output layer they follow from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.compute import set_threads
from rlhf.models.output_layer import hidden_states, output_layer
from rlhf.models.padding import pad
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf.ops.linear import fused_linear_logprobs
from rlhf.reference.requests import Item
from rlhf.wire.records import Floats, HiddenStates

HEAD_PART_BYTES = 2**19
"""Half of the smallest message that a server can be limited to."""


class ReferenceModel:
    """The model, as a function of token sequences. Everything here runs in the worker thread, but for the head, which
    is only read."""

    def __init__(self, model: PreTrainedModel, *, model_sha256: str, tokenizer_sha256: str) -> None:
        """
        Raises:
            ModelError: the model's logits do not follow from its hidden states and output layer alone.
        """
        self.model_sha256 = model_sha256
        self.tokenizer_sha256 = tokenizer_sha256
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
        self.max_context_tokens: int | None = getattr(model.config, "max_position_embeddings", None)
        """None: the architecture knows no limit."""
        self.head = Head(model)
        self.apart = False
        """Each item's log-probs in a product of its own, whose shape, and so whose rounding, is that item's alone."""
        self._model = model
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, threads: int) -> ReferenceModel:
        """
        Raises:
            ModelError: the folder holds no causal language model, or one that is not supported.
        """
        set_threads(threads)
        model, tokenizer = load_causal_lm(folder, device=device, dtype=dtype), load_tokenizer(folder)
        return cls(model, model_sha256=weights_sha256(folder), tokenizer_sha256=tokenizer_sha256(tokenizer))

    def forward(self, items: Sequence[Item]) -> list[Floats | HiddenStates]:
        """Of each item what it asks for, of its R = T - first_scored scored tokens: log-probs [R] at its own
        temperature, or hidden states [R, H] with their bytes inline."""
        with torch.inference_mode():
            states = self._scored_states(items)
            scored = list(zip(items, states, strict=True))
            logprobs = iter(self._logprobs([(item, rows) for item, rows in scored if not item.hidden_states]))
            return [_as_bytes(rows) if item.hidden_states else next(logprobs) for item, rows in scored]

    def logprobs(self, items: Sequence[Item]) -> list[Floats]:
        """Of each item the log-probs [R], whatever it asks for."""
        with torch.inference_mode():
            return self._logprobs(list(zip(items, self._scored_states(items), strict=True)))

    def _scored_states(self, items: Sequence[Item]) -> list[Tensor]:
        """Of each item [R, H]. The state at t - 1 gives the distribution of token t."""
        ids, mask = (part.to(self._model.device) for part in pad([item.token_ids for item in items], pad_id=0))
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        extra = {"position_ids": positions} if self._takes_positions else {}
        states = hidden_states(self._model, input_ids=ids, attention_mask=mask.long(), use_cache=False, **extra)
        return [row[item.first_scored - 1 : len(item.token_ids) - 1] for row, item in zip(states, items, strict=True)]

    def _logprobs(self, scored: Sequence[tuple[Item, Tensor]]) -> list[Floats]:
        """One pass over the output layer for each temperature, of which a batch has seldom more than one."""
        if self.apart:
            return [self._at(item.temperature, [(item, rows)])[0] for item, rows in scored]
        found: dict[int, Floats] = {}
        for temperature in {item.temperature for item, _ in scored}:
            alike = [index for index, (item, _) in enumerate(scored) if item.temperature == temperature]
            found.update(zip(alike, self._at(temperature, [scored[index] for index in alike]), strict=True))
        return [found[index] for index in range(len(scored))]

    def _at(self, temperature: float, scored: Sequence[tuple[Item, Tensor]]) -> list[Floats]:
        labels = np.concatenate([item.token_ids[item.first_scored :] for item, _ in scored]).astype(np.int64)
        states = torch.cat([rows for _, rows in scored])
        logprobs = self.head.logprobs(states, torch.from_numpy(labels), temperature).cpu().numpy()
        return np.split(logprobs, np.cumsum([len(rows) for _, rows in scored])[:-1])


@dataclass(frozen=True)
class HeadShape:
    """What a reader must know of an output layer's bytes."""

    dtype: str
    vocab_size: int
    hidden_size: int
    has_bias: bool
    size_bytes: int
    sha256: str
    """Of the bytes, lower-case hex."""


class Head:
    """A model's output layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            ModelError: the model does more to its hidden states than multiply them.
        """
        self._layer = output_layer(model)
        self.hidden_size: int = self._layer.weight.shape[1]

    def logprobs(self, states: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """[N] float32, of states [N, H] and labels [N]."""
        weight, bias = self._layer.weight, self._layer.bias
        labels = labels.to(states.device)
        return fused_linear_logprobs(states, weight, labels, lm_head_bias=bias, temperature=temperature).logprobs

    @cached_property
    def shape(self) -> HeadShape:
        """Reads the whole layer once."""
        vocab_size, hidden_size = self._layer.weight.shape
        digest, size_bytes = hashlib.sha256(), 0
        for part in self.parts():
            digest.update(part)
            size_bytes += len(part)
        has_bias = self._layer.bias is not None
        return HeadShape(_dtype(self._layer.weight), vocab_size, hidden_size, has_bias, size_bytes, digest.hexdigest())

    def parts(self) -> Iterator[bytes]:
        """Weight [V, H] and bias [V] end to end, in C order and little-endian, `HEAD_PART_BYTES` at a time."""
        for tensor in (self._layer.weight, self._layer.bias):
            if tensor is not None:
                data = tensor.detach().contiguous().view(-1).view(torch.uint8)
                for part in torch.split(data, HEAD_PART_BYTES):
                    yield part.cpu().numpy().tobytes()


def _as_bytes(rows: Tensor) -> HiddenStates:
    data = rows.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return HiddenStates(_dtype(rows), (rows.shape[0], rows.shape[1]), data)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
