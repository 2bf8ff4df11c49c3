"""Token log-probs and entropy from logits, as plain torch: the specification, and the path on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogprobOutput(NamedTuple):
    """Per token, float32, of the shape of the labels; 0 where the label is ignored."""

    logprobs: Tensor
    entropy: Tensor | None


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> LogprobOutput:
    """log p(label) and, if asked for, the entropy in nats of p = softmax(logits / temperature).

    Computed in float32 whatever the logits' dtype: bfloat16 has 8 bits of mantissa, and a ratio is exp of a difference
    of two log-probs.

    Args:
        logits: [..., V], floating.
        labels: [...], int64.
        temperature: > 0; divides the logits before the softmax.
        ignore_index: label of positions that do not count; their outputs are 0 and carry no gradient.
        return_entropy: whether to compute the entropy.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels: shape {tuple(logits.shape[:-1])} expected, {tuple(labels.shape)} received")
    if not temperature > 0:
        raise ValueError(f"temperature: must be > 0, {temperature} received")
    counted_mask = labels != ignore_index
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    picked = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    logprobs = torch.where(counted_mask, picked, 0.0)
    if not return_entropy:
        return LogprobOutput(logprobs, None)
    # A logit of -inf has p = 0 and log p = -inf, whose product is NaN; its contribution is the limit, 0.
    entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
    return LogprobOutput(logprobs, torch.where(counted_mask, entropy, 0.0))
