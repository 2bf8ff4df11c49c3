"""Token batches of a language model: labels, loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.ops.logprobs import logprobs_from_logits
from rlhf.settings import Compute
from rlhf.sft.loop import autocast

IGNORED = -100
"""Label of a position that no loss counts."""

TokenArray = NDArray[np.int32]

_ENCODED_AT_ONCE = 4096


@dataclass(frozen=True)
class TokenBatch:
    input_ids: Tensor
    """[B, T] int64, padded on the right. There is no attention mask: a causal model never looks ahead at padding."""
    labels: Tensor
    """[B, T] int64: the token that follows, or IGNORED."""

    @cached_property
    def weight(self) -> float:
        """Predicted tokens."""
        return float((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(self.input_ids.to(device), self.labels.to(device))


def nll_sum(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood of the labels in nats, summed; float32."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return -logprobs_from_logits(logits, batch.labels, ignore_index=IGNORED).logprobs.sum()


@torch.no_grad()
def mean_nll(model: nn.Module, batches: Iterable[TokenBatch], settings: Compute) -> float:
    """Nats per predicted token over all batches; the model is left in the mode it was in."""
    training, total, count = model.training, 0.0, 0.0
    device = next(model.parameters()).device
    model.eval()
    with autocast(settings):
        for batch in batches:
            total += float(nll_sum(model, batch.to(device)))
            count += batch.weight
    model.train(training)
    return total / count


def perplexity(nll: float) -> float:
    """exp of nats per token."""
    return math.exp(min(nll, 700.0))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenArray]:
    """One array per text, with the special tokens that the tokenizer adds by itself."""
    encoded: list[TokenArray] = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        some = list(texts[start : start + _ENCODED_AT_ONCE])
        ids = tokenizer(some, return_attention_mask=False, verbose=False).input_ids
        encoded.extend(np.asarray(each, dtype=np.int32) for each in ids)
    return encoded
