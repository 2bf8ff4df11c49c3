"""Log-probs of given tokens under the frozen initial model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.compute import set_threads
from rlhf.models.padding import pad
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf.ops.logprobs import logprobs_from_logits
from rlhf.reference.requests import Item
from rlhf.wire.records import Floats


class ReferenceModel:
    """The model, as a function of token sequences. Everything here runs in the worker thread."""

    def __init__(self, model: PreTrainedModel, *, model_sha256: str, tokenizer_sha256: str) -> None:
        self.model_sha256 = model_sha256
        self.tokenizer_sha256 = tokenizer_sha256
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
        self.max_context_tokens: int | None = getattr(model.config, "max_position_embeddings", None)
        """None: the architecture knows no limit."""
        self._model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, threads: int) -> ReferenceModel:
        """
        Raises:
            ModelError: the folder holds no causal language model.
        """
        set_threads(threads)
        model, tokenizer = load_causal_lm(folder, device=device, dtype=dtype), load_tokenizer(folder)
        return cls(model, model_sha256=weights_sha256(folder), tokenizer_sha256=tokenizer_sha256(tokenizer))

    def forward(self, items: Sequence[Item]) -> list[Floats]:
        """Of each item, the log-probs [T - first_scored] of its scored tokens at its own temperature."""
        ids, mask = pad([item.token_ids for item in items], pad_id=0)
        with torch.inference_mode():
            logits = self._logits(ids.to(self._model.device), mask.to(self._model.device))
            return [_logprobs(row, item) for row, item in zip(logits, items, strict=True)]

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T, V]"""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        extra = {"position_ids": positions} if self._takes_positions else {}
        output = self._model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **extra)
        return output.logits  # type: ignore[no-any-return]


def _logprobs(logits: Tensor, item: Item) -> Floats:
    # The logits at t - 1 give the distribution of token t. Row by row, so that only scored tokens meet the softmax.
    scored = logits[item.first_scored - 1 : len(item.token_ids) - 1]
    labels = torch.as_tensor(item.token_ids[item.first_scored :].astype(np.int64), device=logits.device)
    return logprobs_from_logits(scored, labels, item.temperature).logprobs.cpu().numpy()
