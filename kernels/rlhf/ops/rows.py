"""Statistics and gradients of rows of logits, in Triton or in plain torch: what the public functions are made of.

A matrix of logits is seen in slices: of its columns (slices of the vocabulary), of processes (vocabulary-parallel).
`partials` sees one slice, `merge` all of them, and `gradient` again one. Both levels of the public functions, and every
backend, go through these three; `rlhf.ops.definitions` is the specification that they are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.ops.dispatch import launch, uses_triton

LOWEST = -1.0e37
"""Where a maximum starts: below every logit, and finite."""
FIELDS = 8
"""M, s, w, z_y, MR, sr, d, zr_y; rlhf.ops.row_kernels says what they are."""


@dataclass(frozen=True)
class Distribution:
    """What turns rows of logits into distributions over labels."""

    labels: Tensor
    """[N] int64."""
    temperature: float
    ignore_index: int
    vocab: int
    """Labels are within [0, vocab), over all slices."""


class RowOutputs(NamedTuple):
    """What is known of each row once all of its slices have been seen; float32, 0 where the label is ignored.

    Without a reference its fields are empty, as is what only it gives.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    entropy: Tensor
    logsumexp: Tensor
    ref_logsumexp: Tensor
    norms: Tensor
    """[4, N]: M, log s, MR, log sr (without a reference [2, N]), from which any slice's probabilities follow."""


class Upstream(NamedTuple):
    """Gradients of the loss by the outputs, each [N] float32, or None where the loss does not depend on one."""

    logprobs: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None


def upstream(grads: tuple[Tensor | None, ...], has_ref: bool) -> Upstream:
    """What matters of the gradients by the fields of RowOutputs; without a reference its fields are empty."""
    by_name = RowOutputs(*grads)  # type: ignore[arg-type]
    return Upstream(by_name.logprobs, by_name.kl if has_ref else None, by_name.entropy, by_name.logsumexp)


def new_outputs(rows: int, has_ref: bool, device: torch.device) -> RowOutputs:
    """Not filled."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    ref_rows = rows if has_ref else 0
    return RowOutputs(
        new(rows), new(ref_rows), new(ref_rows), new(rows), new(rows), new(ref_rows), new(4 if has_ref else 2, rows)
    )


def new_partials(rows: int, slices: int, device: torch.device) -> Tensor:
    """[N, slices, 8] float32, not filled."""
    return torch.empty(rows, slices, FIELDS, dtype=torch.float32, device=device)


def clear(partials: Tensor) -> None:
    """The statistics of no columns at all."""
    partials.zero_()
    partials[..., [0, 4]] = LOWEST


def parts(logits: Tensor) -> int:
    """Over how many programs a row is spread: one, unless there are too few rows to fill the GPU."""
    rows, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    if not logits.is_cuda or rows == 0:
        return 1
    wanted = -(-2 * torch.cuda.get_device_properties(logits.device).multi_processor_count // rows)
    return _power_of_2(max(1, min(wanted, vocab // 8192)))


def partials(logits: Tensor, ref_logits: Tensor | None, of: Distribution, first_label: int, out: Tensor) -> None:
    """The statistics of one slice of columns, the labels [first_label, first_label + V).

    Args:
        logits, ref_logits: [N, V] or [B, T, V], the last dimension contiguous.
        out: [N, parts, 8] float32, the last dimension contiguous; Triton spreads a row over `parts` programs.
    """
    if uses_triton(logits):
        _launch_partials(logits, ref_logits, of, first_label, out)
        return
    out.zero_()
    flat = logits.flatten(0, -2)
    fields = out[:, 0]
    m = flat.amax(-1).float().clamp_min(LOWEST)
    u = flat.float() - m.unsqueeze(-1)
    e = (u / of.temperature).exp_()
    s = e.sum(-1)
    fields[:, 0], fields[:, 1], fields[:, 3] = m, s, _picked(flat, of, first_label)
    # A logit of -inf counts nothing, and -inf times 0 would count NaN; -1e30 times 0 is 0.
    u.clamp_min_(-1e30)
    fields[:, 2] = _dot(e, u)
    if ref_logits is not None:
        ref = ref_logits.flatten(0, -2)
        mr = ref.amax(-1).float().clamp_min(LOWEST)
        ur = ref.float() - mr.unsqueeze(-1)
        fields[:, 4], fields[:, 7] = mr, _picked(ref, of, first_label)
        fields[:, 6] = _dot(e, u.sub_(ur).masked_fill_(e == 0, 0.0))
        fields[:, 5] = ur.div_(of.temperature).exp_().sum(-1)


def merge(partials: Tensor, of: Distribution, has_ref: bool) -> RowOutputs:
    """The outputs, from the statistics [N, slices, 8] of all slices."""
    if uses_triton(partials):
        outputs = new_outputs(len(partials), has_ref, partials.device)
        _launch_outputs(partials, of, has_ref, outputs)
        return outputs
    return _finish(combine(partials, of.temperature), of, has_ref)


def combine(partials: Tensor, temperature: float, maxima: Tensor | None = None) -> Tensor:
    """[N, 8]: several slices of a row as one, relative to `maxima` [N, 2] (of policy and reference) or to their own."""
    m, s, w, z_y, mr, sr, d, zr_y = partials.unbind(-1)
    top = m.amax(-1) if maxima is None else maxima[:, 0]
    ref_top = mr.amax(-1) if maxima is None else maxima[:, 1]
    shift, ref_shift = m - top.unsqueeze(-1), mr - ref_top.unsqueeze(-1)
    a = (shift / temperature).exp()

    def moved(total: Tensor, by: Tensor) -> Tensor:
        return torch.where(a > 0, a * (total + by), 0.0).sum(-1)

    sums = [(a * s).sum(-1), moved(w, shift * s), z_y.sum(-1)]
    ref_sums = [((ref_shift / temperature).exp() * sr).sum(-1), moved(d, (shift - ref_shift) * s), zr_y.sum(-1)]
    return torch.stack([top, *sums, ref_top, *ref_sums], dim=-1)


def gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    of: Distribution,
    first_label: int,
    outputs: RowOutputs,
    upstream: Upstream,
    out: Tensor,
) -> None:
    """The gradient of one slice of logits, as `row_kernels.row_gradient` gives it.

    Args:
        ref_logits: read only where upstream.kl is there.
        out: of the logits' shape; may be the logits themselves.
    """
    if uses_triton(logits):
        _launch_gradient(logits, ref_logits, of, first_label, outputs, upstream, out)
        return
    norms = outputs.norms.unsqueeze(-1)
    log_p = _log_softmax(logits, norms[0], norms[1], of.temperature)
    weight = torch.zeros_like(norms[0])
    if upstream.logsumexp is not None:
        weight = weight + upstream.logsumexp.unsqueeze(-1)
    if upstream.logprobs is not None:
        weight = weight - upstream.logprobs.unsqueeze(-1)
    if upstream.kl is not None:
        assert ref_logits is not None
        difference = _log_softmax(ref_logits, norms[2], norms[3], of.temperature)
        torch.sub(log_p, difference, out=difference).sub_(outputs.kl.unsqueeze(-1))
        weight = difference.mul_(upstream.kl.unsqueeze(-1)).add_(weight)
    if upstream.entropy is not None:
        weight = weight - upstream.entropy.unsqueeze(-1) * (log_p + outputs.entropy.unsqueeze(-1))
    dz = log_p.exp_().mul_(weight)
    if upstream.logprobs is not None:
        column, held_mask = _columns(of, first_label, dz.shape[-1])
        dz.scatter_add_(-1, column.unsqueeze(-1), (upstream.logprobs * held_mask).unsqueeze(-1))
    dz.div_(of.temperature).masked_fill_((of.labels == of.ignore_index).unsqueeze(-1), 0.0)
    out.copy_(dz.view(out.shape))


def _log_softmax(logits: Tensor, maximum: Tensor, log_sum: Tensor, temperature: float) -> Tensor:
    """[N, V] float32, a new matrix; finite, so that differences and p log p are."""
    shifted = logits.flatten(0, -2) - maximum
    return shifted.div_(temperature).sub_(log_sum).clamp_min_(-1e30)


def _columns(of: Distribution, first_label: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column in a slice, or some column; and the mask of rows whose label the slice holds. Both [N]."""
    column = of.labels - first_label
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """[N]: row by row, without a matrix of products."""
    return torch.bmm(x.unsqueeze(1), y.unsqueeze(2)).view(-1)


def _picked(flat: Tensor, of: Distribution, first_label: int) -> Tensor:
    """[N] float32: the label's logit, 0 where this slice does not hold it."""
    column, held_mask = _columns(of, first_label, flat.shape[-1])
    return torch.where(held_mask, flat.gather(-1, column.unsqueeze(-1)).squeeze(-1).float(), 0.0)


def _finish(whole: Tensor, of: Distribution, has_ref: bool) -> RowOutputs:
    """The kernel `row_outputs` in plain torch, from rows of one slice [N, 8]."""
    m, s, w, z_y, mr, sr, d, zr_y = whole.unbind(-1)
    counted_mask = of.labels != of.ignore_index
    known_mask = (of.labels >= 0) & (of.labels < of.vocab)
    log_s, log_sr = s.log(), sr.log()

    def counted(values: Tensor) -> Tensor:
        return torch.where(counted_mask, values, 0.0)

    def logprobs(picked: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
        return counted(torch.where(known_mask, (picked - maximum) / of.temperature - log_sum, torch.nan))

    nothing = s.new_empty(0)
    return RowOutputs(
        logprobs=logprobs(z_y, m, log_s),
        ref_logprobs=logprobs(zr_y, mr, log_sr) if has_ref else nothing,
        kl=counted(d / (of.temperature * s) + (sr / s).log()) if has_ref else nothing.clone(),
        entropy=counted(log_s - w / (of.temperature * s)),
        logsumexp=counted(m / of.temperature + log_s),
        ref_logsumexp=counted(mr / of.temperature + log_sr) if has_ref else nothing.clone(),
        norms=torch.stack([m, log_s, mr, log_sr] if has_ref else [m, log_s]),
    )


def _strides(matrix: Tensor) -> tuple[int, int, int]:
    """How the kernels walk rows: rows of the inner dimension, outer stride, inner stride."""
    if matrix.dim() == 2:
        return matrix.shape[0], 0, matrix.stride(0)
    return matrix.shape[1], matrix.stride(0), matrix.stride(1)


def _launch_partials(
    logits: Tensor, ref_logits: Tensor | None, of: Distribution, first_label: int, out: Tensor
) -> None:
    from rlhf.ops import row_kernels

    rows, parts, vocab = len(of.labels), out.shape[1], logits.shape[-1]
    inner, *strides = _strides(logits)
    _, *ref_strides = _strides(logits if ref_logits is None else ref_logits)
    launch(
        row_kernels.row_partials, rows * parts, logits,
        logits, logits if ref_logits is None else ref_logits, of.labels, out, max(inner, 1), *strides, *ref_strides,
        out.stride(0), vocab, first_label, of.ignore_index, float(of.temperature),
        HAS_REF=ref_logits is not None, PARTS=parts, **_partials_tile(logits, vocab),
    )  # fmt: skip


def _partials_tile(logits: Tensor, vocab: int) -> dict[str, int]:
    if not logits.is_cuda:
        # The interpreter's cost is per tile, whatever its size.
        return {"R": 4, "L": max(16, min(8192, _power_of_2(vocab) // 4))}
    # 16-byte loads * 32 lanes * warps: the first axis stays within a thread. Eight of them in flight per model.
    warps = 4 if vocab > 2048 else 1
    return {"R": 8, "L": 16 // logits.element_size() * 32 * warps, "num_warps": warps}


def _launch_outputs(partials: Tensor, of: Distribution, has_ref: bool, outputs: RowOutputs) -> None:
    from rlhf.ops import row_kernels

    rows, parts, _ = partials.shape
    padded = _power_of_2(parts)
    block = max(1, 256 // padded)
    launch(
        row_kernels.row_outputs, -(-rows // block), partials,
        partials, of.labels, *outputs, rows, parts, partials.stride(0), of.vocab, of.ignore_index,
        float(of.temperature), HAS_REF=has_ref, PARTS=padded, B=block,
    )  # fmt: skip


def _launch_gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    of: Distribution,
    first_label: int,
    outputs: RowOutputs,
    upstream: Upstream,
    out: Tensor,
) -> None:
    from rlhf.ops import row_kernels

    # A gradient may be an expanded scalar; one that is not there is not read.
    g_logprobs, g_kl, g_entropy, g_logsumexp = (outputs.norms if g is None else g.contiguous() for g in upstream)
    vocab = logits.shape[-1]
    block = min(8192 if logits.is_cuda else 32768, _power_of_2(vocab))
    options = {"num_warps": 8 if block >= 4096 else 4} if logits.is_cuda else {}
    read_ref = logits if ref_logits is None else ref_logits
    inner, *strides = _strides(logits)
    launch(
        row_kernels.row_gradient, len(of.labels) * -(-vocab // block), logits,
        logits, read_ref, of.labels, outputs.kl, outputs.entropy, outputs.norms, g_logprobs, g_kl, g_entropy,
        g_logsumexp, out, len(of.labels), max(inner, 1), *strides, *_strides(read_ref)[1:], *_strides(out)[1:], vocab,
        first_label, of.ignore_index, float(of.temperature), HAS_LOGPROBS=upstream.logprobs is not None,
        HAS_LOGSUMEXP=upstream.logsumexp is not None, HAS_KL=upstream.kl is not None,
        HAS_ENTROPY=upstream.entropy is not None, BLOCK=block, **options,
    )  # fmt: skip


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
