"""The log-prob functions as anyone would write them: the specification, and what the tests compare the fast ones with.

Same signatures as the public functions of the same names; arguments that only say how to compute are ignored. On
devices other than a GPU the functions of logits are these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ops.output import LogprobOutput


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> LogprobOutput:
    """log p(label), and the entropy if asked for."""
    log_p, counted_mask = torch.log_softmax(_scaled(logits, temperature), dim=-1), labels != ignore_index
    return LogprobOutput(
        logprobs=_counted(_picked(log_p, labels), counted_mask),
        entropy=_counted(_entropy(log_p), counted_mask) if return_entropy else None,
    )


def logprobs_kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> LogprobOutput:
    """log p(label), log r(label), KL(p ‖ r), the entropy of p, and both log Σ exp."""
    z, zr, counted_mask = (
        _scaled(logits, temperature),
        _scaled(ref_logits.detach(), temperature),
        labels != ignore_index,
    )
    log_p, log_r = torch.log_softmax(z, dim=-1), torch.log_softmax(zr, dim=-1)
    return LogprobOutput(
        logprobs=_counted(_picked(log_p, labels), counted_mask),
        ref_logprobs=_counted(_picked(log_r, labels), counted_mask),
        kl=_counted(_kl(log_p, log_r), counted_mask),
        entropy=_counted(_entropy(log_p), counted_mask),
        logsumexp=_counted(z.logsumexp(-1), counted_mask),
        ref_logsumexp=_counted(zr.logsumexp(-1), counted_mask),
    )


def fused_linear_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    ref_hidden_states: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    ref_lm_head_bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_vocab_size: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    workspace_bytes: int | None = None,
    process_group: object = None,
) -> LogprobOutput:
    """The same of logits = hidden_states · lm_head_weightᵀ + lm_head_bias, of the first valid_vocab_size labels."""
    logits = _logits(hidden_states, lm_head_weight, lm_head_bias, valid_vocab_size, logits_dtype)
    if ref_hidden_states is None:
        alone = logprobs_from_logits(logits, labels, temperature, ignore_index=ignore_index, return_entropy=True)
        logsumexp = _scaled(logits, temperature).logsumexp(-1)
        return alone._replace(logsumexp=_counted(logsumexp, labels != ignore_index))
    ref_weight = lm_head_weight if ref_lm_head_weight is None else ref_lm_head_weight
    ref_bias = lm_head_bias if ref_lm_head_weight is None else ref_lm_head_bias
    with torch.no_grad():
        ref_logits = _logits(ref_hidden_states, ref_weight, ref_bias, valid_vocab_size, logits_dtype)
    return logprobs_kl_from_logits(logits, ref_logits, labels, temperature, ignore_index=ignore_index)


def _logits(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, valid_vocab_size: int | None, dtype: torch.dtype
) -> Tensor:
    logits = hidden_states.to(dtype) @ weight[:valid_vocab_size].to(dtype).T
    return logits if bias is None else logits + bias[:valid_vocab_size].to(dtype)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in at least float32: bfloat16 has 8 bits of mantissa, and a ratio is exp of a difference of
    two log-probs."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _picked(log_p: Tensor, labels: Tensor) -> Tensor:
    known_mask = (labels >= 0) & (labels < log_p.shape[-1])
    picked = log_p.gather(-1, labels.clamp(0, log_p.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return torch.where(known_mask, picked, torch.nan)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * _where_possible(log_p, log_p)).sum(-1)


def _kl(log_p: Tensor, log_r: Tensor) -> Tensor:
    """Σ p (log p - log r) + r - p: as Σ r = Σ p = 1 the last two change nothing, but with them an error common to all
    of log p or log r, such as that of log Σ exp, counts in second order only."""
    p, r = log_p.exp(), log_r.exp()
    return (p * (_where_possible(log_p, log_p) - _where_possible(log_p, log_r)) + (r - p)).sum(-1)


def _where_possible(log_p: Tensor, values: Tensor) -> Tensor:
    """0 where p = 0: p log p has the limit 0 there, where a product, or its gradient, would be NaN."""
    return torch.where(log_p.isneginf(), 0.0, values)


def _counted(values: Tensor, counted_mask: Tensor) -> Tensor:
    return torch.where(counted_mask, values, 0.0)
