"""Log-probs, entropy and exact KL from hidden states, without the matrix [tokens, vocabulary].

    forward                                       backward
    for each slice of the vocabulary:             for each slice of the vocabulary:
        logits  = hidden · weight[slice]ᵀ             logits again, or those kept
        statistics of the slice's rows                gradient of the logits        (rows.gradient)
    merge the statistics: all outputs                 d weight[slice] = gradientᵀ · hidden
                                                      d hidden       += gradient · weight[slice]

Slices of the vocabulary rather than of the tokens: each row of d weight is one product, written once, and only d hidden
is accumulated. The backward pass computes the logits again, but for those that the workspace has room to keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.ops import parallel, rows
from rlhf.ops.checks import check_head, check_labels, check_temperature
from rlhf.ops.dispatch import uses_triton
from rlhf.ops.heads import Head, HeadGradient, default_workspace_bytes, slice_columns, slices
from rlhf.ops.output import LogprobOutput

# Plain torch takes several passes over a slice: one that stays in the cache between them is faster than a wide one.
CACHED_SLICE_BYTES = 2**23


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
    process_group: dist.ProcessGroup | None = None,
) -> LogprobOutput:
    """Log-probs and entropy of p = softmax((hidden_states · lm_head_weightᵀ + lm_head_bias) / temperature) and, given
    the reference's hidden states, its log-probs and the exact KL(p ‖ r); the logits never exist all at once.

    With N tokens, k models and b bytes a logit, what is needed beside inputs and results is k · b · N · columns bytes
    forward, and (k · b + bytes of the hidden states' dtype) · N · columns + 4 · N · H backward, where a slice of
    `columns` fills a quarter of the workspace; and until the backward pass k · b · N for each column of which the
    logits are kept, as many as the other three quarters hold. Where all logits fit into the workspace, all are kept,
    and nothing is computed twice.

    Args:
        hidden_states: [..., H] float32, bfloat16 or float16; what the output layer reads. Under autocast it and the
            weights are converted, as by torch's own linear layer.
        lm_head_weight: [V, H] of the same dtype; in a process group this rank's share of the labels.
        labels: [...] int64, within [0, V) or ignore_index; in a process group of all shares' labels.
        ref_hidden_states: [..., H'] of the frozen reference.
        ref_lm_head_weight: [V, H']; None: the reference shares the policy's output layer, as with adapters.
        lm_head_bias, ref_lm_head_bias: [V].
        temperature: > 0; divides the logits.
        ignore_index: label of positions that do not count; their outputs are 0 and carry no gradient.
        valid_vocab_size: labels from here on are padding of the weight's rows, and have no probability.
        logits_dtype: float32, or the hidden states' own dtype, which is faster and rounds: see `rlhf.ops.heads`.
        workspace_bytes: for logits and their gradients; at least 128 columns are computed at once. None: 2 GiB on a
            GPU, 384 MiB elsewhere.
        process_group: the vocabulary is divided equally between its ranks; forward takes one MAX and one SUM over
            [N, 8] floats, backward one SUM of the hidden states' gradient. All ranks pass the same hidden states.

    Returns:
        per token, float32; without a reference its fields are None.

    Raises:
        ValueError: names the argument, the rule and what was received.
    """
    policy, reference = layers(
        (hidden_states, lm_head_weight, lm_head_bias),
        (ref_hidden_states, ref_lm_head_weight, ref_lm_head_bias),
        logits_dtype,
    )
    vocab = vocabulary(len(lm_head_weight), valid_vocab_size, process_group)
    check_labels(labels, hidden_states.shape[:-1], hidden_states.device, vocab, ignore_index)
    check_temperature(temperature)
    needs_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in policy)
    columns, backward_columns, kept_columns = _plan(
        policy[0], len(lm_head_weight), reference, logits_dtype, workspace_bytes, needs_backward
    )
    found = _statistics(
        *flattened(policy), labels.reshape(-1).contiguous(), *flattened(reference or (None, None, None)), temperature,
        ignore_index, vocab, logits_dtype, columns, backward_columns, kept_columns, parallel.group_name(process_group),
    )  # fmt: skip
    return shaped(rows.RowOutputs(*found[:7]), labels.shape)


_Layer = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight, bias."""


def layers(
    policy: _Layer, reference: tuple[Tensor | None, Tensor | None, Tensor | None], logits_dtype: torch.dtype
) -> tuple[_Layer, _Layer | None]:
    """Both models' layers as they are computed with; None where there is no reference.

    Raises:
        ValueError: one is malformed, or they do not fit together.
    """
    policy = _autocast(*policy)
    own_reference = _reference(policy, *reference)
    check_head("", *policy, logits_dtype)
    if own_reference is not None:
        _check_reference(own_reference, policy, logits_dtype)
    return policy, own_reference


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Layer:
    """Converted as torch's own linear layer converts them under autocast; else as they are."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _reference(policy: _Layer, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> _Layer | None:
    """The frozen reference's layer; without a weight of its own it has the policy's layer.

    Raises:
        ValueError: a weight or bias without hidden states, or a bias without its weight.
    """
    if hidden is None:
        if weight is not None or bias is not None:
            raise ValueError("ref_lm_head_weight, ref_lm_head_bias: without ref_hidden_states they apply to nothing")
        return None
    if weight is None:
        if bias is not None:
            raise ValueError(
                "ref_lm_head_bias: without ref_lm_head_weight the reference has the policy's weight and bias"
            )
        weight, bias = policy[1], policy[2]
    return _autocast(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


def _check_reference(reference: _Layer, policy: _Layer, logits_dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: the reference's layer is malformed, or not of the policy's tokens and labels.
    """
    check_head("ref_", *reference, logits_dtype)
    expected, received = policy[0].shape[:-1], reference[0].shape[:-1]
    if received != expected:
        raise ValueError(
            f"ref_hidden_states: shape {(*expected, reference[0].shape[-1])} expected, "
            f"{tuple(reference[0].shape)} received"
        )
    if len(reference[1]) != len(policy[1]):
        raise ValueError(f"ref_lm_head_weight: {len(policy[1])} rows expected, {len(reference[1])} received")


def flattened(layer: tuple[Tensor | None, Tensor | None, Tensor | None]) -> tuple[Any, Any, Any]:
    """Hidden states as [N, H]."""
    hidden, weight, bias = layer
    return None if hidden is None else hidden.flatten(0, -2), weight, bias


def shaped(outputs: rows.RowOutputs, shape: torch.Size) -> LogprobOutput:
    """Rows as the labels lie."""
    if not len(outputs.kl) and len(outputs.logprobs):
        logprobs, entropy, logsumexp = (x.view(shape) for x in (outputs.logprobs, outputs.entropy, outputs.logsumexp))
        return LogprobOutput(logprobs, entropy=entropy, logsumexp=logsumexp)
    return LogprobOutput(*(values.view(shape) for values in outputs[:6]))


def vocabulary(own_labels: int, valid_vocab_size: int | None, group: dist.ProcessGroup | None) -> int:
    """Of how many labels the distributions are, over all processes."""
    _, size = parallel.rank_and_size(group)
    vocab = own_labels * size if valid_vocab_size is None else valid_vocab_size
    if not 0 < vocab <= own_labels * size:
        raise ValueError(f"valid_vocab_size: within [1, {own_labels * size}] expected, {vocab} received")
    return vocab


def _plan(
    hidden: Tensor,
    vocab: int,
    reference: _Layer | None,
    logits_dtype: torch.dtype,
    workspace_bytes: int | None,
    needs_backward: bool,
) -> tuple[int, int, int]:
    """The width of a slice forward and backward, and of how many columns the logits are kept for the backward pass.

    Forward it does not depend on whether there will be a backward pass: equal products make equal sums, so that a ratio
    of probabilities computed with and without gradient is exactly 1.
    """
    limit = default_workspace_bytes(hidden.device) if workspace_bytes is None else workspace_bytes
    tokens = hidden.shape[:-1].numel()
    forward_bytes = (1 if reference is None else 2) * logits_dtype.itemsize
    fits = tokens * vocab * forward_bytes <= limit
    # A quarter for the slice at hand, the rest for what is kept.
    slice_bytes = limit // 4 if uses_triton(hidden) else min(limit // 4, CACHED_SLICE_BYTES)
    columns = vocab if fits else slice_columns(tokens, vocab, forward_bytes, slice_bytes)
    backward_columns = slice_columns(tokens, vocab, forward_bytes + hidden.element_size(), slice_bytes)
    keep = limit if fits else limit - slice_bytes
    kept_columns = keep // max(1, tokens * forward_bytes) // columns * columns
    return columns, backward_columns, min(kept_columns, vocab) if needs_backward else 0


_Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("rlhf::linear_statistics", mutates_args=())
def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab: int,
    logits_dtype: torch.dtype,
    columns: int,
    backward_columns: int,
    kept_columns: int,
    group: str,
) -> _Nine:
    """The fields of rows.RowOutputs, and the logits of policy and reference as far as they are kept."""
    with torch.autocast(hidden.device.type, enabled=False):
        process_group = parallel.resolve(group)
        of, first_label, own_labels = share(labels, temperature, ignore_index, vocab, len(weight), process_group)
        head, ref_head = heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logits_dtype)
        # One slice that is kept needs no copy.
        whole = min(columns, kept_columns) >= own_labels
        kept, ref_kept = _new_kept(
            hidden, 0 if whole else min(kept_columns, own_labels), ref_head is not None, logits_dtype
        )
        widths = list(slices(own_labels, columns))
        partials = rows.new_partials(len(hidden), max(1, len(widths)), hidden.device)
        if not widths:
            rows.clear(partials)
        for i, part in enumerate(widths):
            logits = head.logits(part)
            ref_logits = None if ref_head is None else ref_head.logits(part)
            rows.partials(logits, ref_logits, of, first_label + part.start, partials[:, i : i + 1])
            if whole:
                kept, ref_kept = logits, ref_kept if ref_logits is None else ref_logits
            elif part.stop <= kept.shape[1]:
                kept[:, part] = logits
                if ref_logits is not None:
                    ref_kept[:, part] = ref_logits
            # Or they would live on beside the next slice's.
            del logits, ref_logits
        outputs = parallel.merge(partials, of, ref_head is not None, process_group)
    return (*outputs, kept, ref_kept)


def _new_kept(hidden: Tensor, columns: int, has_ref: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, columns] each, not filled."""
    tokens = hidden.shape[0]
    return (
        hidden.new_empty(tokens, columns, dtype=dtype),
        hidden.new_empty(tokens, columns if has_ref else 0, dtype=dtype),
    )


@_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, ref_hidden: Tensor | None, *rest: Any) -> _Nine:
    _, _, _, _, vocab, logits_dtype, _, _, kept_columns, group = rest
    _, _, own_labels = share(labels, 1.0, 0, vocab, len(weight), parallel.resolve(group))
    outputs = rows.new_outputs(len(labels), ref_hidden is not None, hidden.device)
    return (*outputs, *_new_kept(hidden, min(kept_columns, own_labels), ref_hidden is not None, logits_dtype))


def share(
    labels: Tensor, temperature: float, ignore_index: int, vocab: int, rows_here: int, group: dist.ProcessGroup | None
) -> tuple[rows.Distribution, int, int]:
    """The distribution, this process's first label, and how many labels it holds, padding not counted."""
    rank, _ = parallel.rank_and_size(group)
    first_label = rank * rows_here
    own_labels = min(rows_here, max(0, vocab - first_label))
    return rows.Distribution(labels, temperature, ignore_index, vocab), first_label, own_labels


def heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    logits_dtype: torch.dtype,
) -> tuple[Head, Head | None]:
    head = Head(hidden, weight, bias, logits_dtype)
    if ref_hidden is None or ref_weight is None:
        return head, None
    return head, Head(ref_hidden, ref_weight, ref_bias, logits_dtype)


@torch.library.custom_op("rlhf::linear_gradient", mutates_args=())
def _gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl: Tensor,
    entropy: Tensor,
    norms: Tensor,
    kept: Tensor,
    ref_kept: Tensor,
    g_logprobs: Tensor | None,
    g_kl: Tensor | None,
    g_entropy: Tensor | None,
    g_logsumexp: Tensor | None,
    needs: list[bool],
    temperature: float,
    ignore_index: int,
    vocab: int,
    logits_dtype: torch.dtype,
    columns: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not needed."""
    with torch.autocast(hidden.device.type, enabled=False):
        process_group = parallel.resolve(group)
        of, first_label, own_labels = share(labels, temperature, ignore_index, vocab, len(weight), process_group)
        head, ref_head = heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logits_dtype)
        outputs = rows.RowOutputs(kl, kl, kl, entropy, kl, kl, norms)
        upstream = rows.Upstream(g_logprobs, g_kl, g_entropy, g_logsumexp)
        found = HeadGradient(hidden, weight, (needs[0], needs[1], needs[2]))
        kept_columns = kept.shape[1]
        for part in (*slices(kept_columns, columns), *slices(own_labels, columns, start=kept_columns)):
            is_kept = part.stop <= kept_columns
            logits = kept[:, part] if is_kept else head.logits(part)
            ref_logits = None
            if g_kl is not None and ref_head is not None:
                ref_logits = ref_kept[:, part] if is_kept else ref_head.logits(part)
            own_memory = not is_kept and logits.dtype == found.dtype
            out = logits if own_memory else torch.empty(logits.shape, dtype=found.dtype, device=logits.device)
            rows.gradient(logits, ref_logits, of, first_label + part.start, outputs, upstream, out)
            found.add(out, part)
            del logits, ref_logits, out
        parallel.sum_(found.hidden, process_group)
    return (
        found.hidden.to(hidden.dtype),
        found.weight,
        found.bias.to(weight.dtype),
    )


@_gradient.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = rest[13]

    def new(like: Tensor, wanted: bool) -> Tensor:
        return like.new_empty(like.shape if wanted else 0)

    return new(hidden, needs_hidden), new(weight, needs_weight), weight.new_empty(len(weight) if needs_bias else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: _Nine) -> None:
    tensors, ctx.arguments = inputs[:7], (*inputs[7:11], inputs[12], inputs[14])
    found, kept = rows.RowOutputs(*output[:7]), output[7:]
    ctx.save_for_backward(*tensors, found.kl, found.entropy, found.norms, *kept)
    ctx.mark_non_differentiable(found.ref_logprobs, found.ref_logsumexp, found.norms, *kept)
    # What the loss does not depend on arrives as None, and is not computed.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = rows.upstream(grads[:7], has_ref=ctx.saved_tensors[4] is not None)
    needs = list(ctx.needs_input_grad[:3])
    found: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs) and any(g is not None for g in upstream):
        gradients = _gradient(*ctx.saved_tensors, *upstream, needs, *ctx.arguments)
        found = tuple(g if wanted else None for g, wanted in zip(gradients, needs, strict=True))
    return *found, *([None] * 12)


_statistics.register_autograd(_backward, setup_context=_keep)
