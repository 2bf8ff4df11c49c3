"""Log-probs, entropy and exact KL from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.ops import definitions, rows
from rlhf.ops.checks import check_labels, check_matrix, check_temperature
from rlhf.ops.dispatch import uses_triton
from rlhf.ops.output import LogprobOutput


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> LogprobOutput:
    """log p(label) and, if asked for, the entropy in nats, of p = softmax(logits / temperature).

    On a GPU one kernel reads the logits once, and its backward pass once more; computed in float32 whatever the logits'
    dtype is. Elsewhere: `rlhf.ops.definitions`.

    Args:
        logits: [..., V] float32, bfloat16 or float16 (elsewhere float64 too); the last dimension contiguous. Rows may
            lie apart: a slice like logits[:, :-1] is not copied.
        labels: [...] int64, within [0, V) or ignore_index.
        temperature: > 0; divides the logits before the softmax.
        ignore_index: label of positions that do not count; their outputs are 0 and carry no gradient.
        return_entropy: whether the entropy is wanted.

    Returns:
        logprobs and, if asked for, entropy; the gradient has the logits' dtype.

    Raises:
        ValueError: names the argument, the rule and what was received.
    """
    _check(logits, None, labels, temperature, ignore_index)
    if not uses_triton(logits):
        return definitions.logprobs_from_logits(
            logits, labels, temperature, ignore_index=ignore_index, return_entropy=return_entropy
        )
    output = _through_kernels(logits, None, labels, temperature, ignore_index)
    return LogprobOutput(output.logprobs, entropy=output.entropy if return_entropy else None)


def logprobs_kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> LogprobOutput:
    """log p(label), log r(label), the exact KL(p ‖ r) and the entropy of p, in one pass over both models' logits.

    p = softmax(logits / temperature) is the policy, r = softmax(ref_logits / temperature) the frozen reference.

    Args:
        logits, ref_logits, labels, temperature, ignore_index: see `logprobs_from_logits`; ref_logits has the logits'
            shape, and may have another dtype.
        inplace_backward: on a GPU, the backward pass writes the gradient over the logits, and so needs no memory; they
            must not be needed by anything else, a second backward pass included. Not together with torch.compile.

    Returns:
        every field; the reference's receive no gradient.

    Raises:
        ValueError: names the argument, the rule and what was received.
    """
    _check(logits, ref_logits, labels, temperature, ignore_index)
    if not uses_triton(logits):
        return definitions.logprobs_kl_from_logits(logits, ref_logits, labels, temperature, ignore_index=ignore_index)
    return _through_kernels(logits, ref_logits.detach(), labels, temperature, ignore_index, inplace_backward)


def _check(logits: Tensor, ref_logits: Tensor | None, labels: Tensor, temperature: float, ignore_index: int) -> None:
    check_matrix("logits", logits, least_dim=1)
    if ref_logits is not None:
        check_matrix("ref_logits", ref_logits, least_dim=1, like=logits)
    check_labels(labels, logits.shape[:-1], logits.device, logits.shape[-1], ignore_index)
    check_temperature(temperature)


def _through_kernels(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    temperature: float,
    ignore_index: int,
    inplace_backward: bool = False,
) -> LogprobOutput:
    flat, ref_flat = _rows(logits), None if ref_logits is None else _rows(ref_logits)
    arguments = (flat, ref_flat, labels.reshape(-1).contiguous(), temperature, ignore_index)
    found = rows.RowOutputs(*(_InPlace.apply(*arguments) if inplace_backward else _statistics(*arguments)))  # type: ignore[no-untyped-call]

    def shaped(values: Tensor) -> Tensor:
        return values.view(labels.shape)

    if ref_logits is None:
        return LogprobOutput(shaped(found.logprobs), entropy=shaped(found.entropy), logsumexp=shaped(found.logsumexp))
    return LogprobOutput(*(shaped(values) for values in found[:6]))


def _rows(logits: Tensor) -> Tensor:
    """As the kernels walk it: two dimensions, or three where rows cannot be seen as one dimension without a copy."""
    if logits.dim() == 1:
        return logits.unsqueeze(0)
    return logits if logits.dim() <= 3 else logits.flatten(0, -3)


def _of(logits: Tensor, labels: Tensor, temperature: float, ignore_index: int) -> rows.Distribution:
    return rows.Distribution(labels, temperature, ignore_index, logits.shape[-1])


def _compute(
    logits: Tensor, ref_logits: Tensor | None, labels: Tensor, temperature: float, ignore_index: int
) -> rows.RowOutputs:
    of = _of(logits, labels, temperature, ignore_index)
    partials = rows.new_partials(len(labels), rows.parts(logits), logits.device)
    rows.partials(logits, ref_logits, of, 0, partials)
    return rows.merge(partials, of, ref_logits is not None)


_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("rlhf::logits_statistics", mutates_args=())
def _statistics(
    logits: Tensor, ref_logits: Tensor | None, labels: Tensor, temperature: float, ignore_index: int
) -> _Seven:
    """The fields of rows.RowOutputs."""
    return tuple(_compute(logits, ref_logits, labels, temperature, ignore_index))  # type: ignore[return-value]


@_statistics.register_fake
def _(logits: Tensor, ref_logits: Tensor | None, labels: Tensor, temperature: float, ignore_index: int) -> _Seven:
    return tuple(rows.new_outputs(labels.shape[0], ref_logits is not None, logits.device))  # type: ignore[return-value]


@torch.library.custom_op("rlhf::logits_gradient", mutates_args=())
def _gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    kl: Tensor,
    entropy: Tensor,
    norms: Tensor,
    temperature: float,
    ignore_index: int,
    g_logprobs: Tensor | None,
    g_kl: Tensor | None,
    g_entropy: Tensor | None,
    g_logsumexp: Tensor | None,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    found = rows.RowOutputs(kl, kl, kl, entropy, kl, kl, norms)
    of = _of(logits, labels, temperature, ignore_index)
    rows.gradient(logits, ref_logits, of, 0, found, rows.Upstream(g_logprobs, g_kl, g_entropy, g_logsumexp), out)
    return out


@_gradient.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: _Seven) -> None:
    logits, ref_logits, labels, ctx.temperature, ctx.ignore_index = inputs
    found = rows.RowOutputs(*output)
    ctx.save_for_backward(logits, ref_logits, labels, found.kl, found.entropy, found.norms)
    ctx.mark_non_differentiable(found.ref_logprobs, found.ref_logsumexp, found.norms)
    # What the loss does not depend on arrives as None, and is not computed.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, ref_logits, labels, kl, entropy, norms = ctx.saved_tensors
    upstream = rows.upstream(grads, has_ref=ref_logits is not None)
    if not ctx.needs_input_grad[0] or all(g is None for g in upstream):
        return None, None, None, None, None
    ref_logits = None if upstream.kl is None else ref_logits
    gradient = _gradient(logits, ref_logits, labels, kl, entropy, norms, ctx.temperature, ctx.ignore_index, *upstream)
    return gradient, None, None, None, None


_statistics.register_autograd(_backward, setup_context=_keep)


class _InPlace(torch.autograd.Function):
    """`_statistics` whose gradient overwrites the logits; a custom operator may not return memory of its inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> _Seven:
        output: _Seven = tuple(_compute(*inputs))  # type: ignore[assignment]
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ref_logits, labels, kl, entropy, norms = ctx.saved_tensors
        upstream = rows.upstream(grads, has_ref=ref_logits is not None)
        of = _of(logits, labels, ctx.temperature, ctx.ignore_index)
        found = rows.RowOutputs(kl, kl, kl, entropy, kl, kl, norms)
        rows.gradient(logits, ref_logits, of, 0, found, upstream, logits)
        return logits, None, None, None, None
