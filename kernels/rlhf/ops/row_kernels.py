"""Triton kernels over rows of logits: statistics of softmax(logits / T), and the gradient of what is made of them.

One row is one token's logits. A program walks a part of a row in tiles [R, L]; every lane keeps the maximum and the
sums of its own columns, over raw logits, and lanes meet once, at the end. With M = max z and, of the reference,
MR = max zr, sums are taken relative to the maxima, so that a shift of all logits changes nothing:

    s  = Σ exp((z - M) / T)                    w = Σ exp((z - M) / T) (z - M)
    sr = Σ exp((zr - MR) / T)                  d = Σ exp((z - M) / T) ((z - M) - (zr - MR))

    logprob     = (z_y - M) / T - log s        entropy = log s - w / (T s)
    ref_logprob = (zr_y - MR) / T - log sr     KL(policy ‖ reference) = d / (T s) + log(sr / s)

In d the difference is taken before the sum: where the models almost agree it is small, and so is its rounding error.
Where a maximum moves from m to m', with a = exp((m - m') / T): s ← a s, w ← a (w + (m - m') s) and
d ← a (d + ((m - m') - (mr - mr')) s).

Parts of a row (of one program, of one slice of the vocabulary, of one process) are merged by the same three rules.
Offsets are int64 and grids have one dimension: tokens times vocabulary exceeds 2³¹, and other grid dimensions end at
65535. `rlhf.ops.rows` launches these, and holds the same computation in plain torch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Where a maximum starts: below every logit, and finite, because -inf - -inf is NaN.
LOWEST = tl.constexpr(-1.0e37)
FIELDS = tl.constexpr(8)


@triton.jit
def _moved(total, shift, a):
    """A sum of weighted differences after its maximum has moved; where nothing of it is left, 0 and not 0 · inf."""
    return tl.where(a > 0, a * (total + shift), 0.0)


@triton.jit
def _see(z_tile, zr_tile, there, m, s, w, mr, sr, d, scale, HAS_REF: tl.constexpr, MASKED: tl.constexpr):
    """The sums of every lane after one more tile [R, L]; without a mask a load needs no value to put in its place."""
    if MASKED:
        z = tl.load(z_tile, mask=there, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    else:
        z = tl.load(z_tile, eviction_policy="evict_first").to(tl.float32)
    m_new = tl.maximum(m, tl.max(z, axis=0))
    a = tl.exp2((m - m_new) * scale)
    # A logit of -inf counts nothing, and -inf times 0 would count NaN; -1e30 times 0 is 0. NaN stays NaN.
    u = tl.maximum(z - m_new[None, :], -1e30, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(u * scale)
    if HAS_REF:
        if MASKED:
            zr = tl.load(zr_tile, mask=there, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        else:
            zr = tl.load(zr_tile, eviction_policy="evict_first").to(tl.float32)
        mr_new = tl.maximum(mr, tl.max(zr, axis=0))
        ur = zr - mr_new[None, :]
        sr = sr * tl.exp2((mr - mr_new) * scale) + tl.sum(tl.exp2(ur * scale), axis=0)
        difference = tl.where(e > 0, u - ur, 0.0)
        d = _moved(d, ((m - m_new) - (mr - mr_new)) * s, a) + tl.sum(e * difference, axis=0)
        mr = mr_new
    w = _moved(w, (m - m_new) * s, a) + tl.sum(e * u, axis=0)
    s = a * s + tl.sum(e, axis=0)
    return m_new, s, w, mr, sr, d


@triton.jit
def row_partials(
    logits,
    ref_logits,
    labels,
    partials,
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    partials_stride,
    vocab,
    first_label,
    ignore_index,
    temperature,
    HAS_REF: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    """Of each of PARTS parts of each row, partials [rows, >= PARTS, 8] float32: M, s, w, z_y, MR, sr, d, zr_y.

    Row i of the logits starts at (i // inner) * outer_stride + (i % inner) * inner_stride. z_y and zr_y are 0 in the
    parts that do not hold the label. Rows whose label is ignore_index are left as they are.
    """
    program = tl.program_id(0).to(tl.int64)
    row, part = program // PARTS, program % PARTS
    label = tl.load(labels + row)
    if label == ignore_index:
        return
    scale = LOG2E / temperature
    column = label - first_label
    z_row = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    zr_row = ref_logits + (row // inner) * ref_outer_stride + (row % inner) * ref_inner_stride
    width = tl.cdiv(tl.cdiv(vocab, PARTS), R * L) * (R * L)
    begin = part.to(tl.int32) * width
    end = tl.minimum(begin + width, vocab)

    m = tl.full([L], LOWEST, tl.float32)
    s = tl.zeros([L], tl.float32)
    w = tl.zeros([L], tl.float32)
    mr = tl.full([L], LOWEST, tl.float32)
    sr = tl.zeros([L], tl.float32)
    d = tl.zeros([L], tl.float32)
    places = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    full = begin + tl.maximum(end - begin, 0) // (R * L) * (R * L)
    for start in range(begin, full, R * L):
        at = start + places
        m, s, w, mr, sr, d = _see(z_row + at, zr_row + at, at, m, s, w, mr, sr, d, scale, HAS_REF, False)
    if full < end:
        at = full + places
        m, s, w, mr, sr, d = _see(z_row + at, zr_row + at, at < end, m, s, w, mr, sr, d, scale, HAS_REF, True)

    M = tl.max(m, axis=0)
    a = tl.exp2((m - M) * scale)
    out = partials + row * partials_stride + part * FIELDS
    held = (column >= begin) & (column < end)
    tl.store(out, M)
    tl.store(out + 1, tl.sum(a * s, axis=0))
    tl.store(out + 2, tl.sum(_moved(w, (m - M) * s, a), axis=0))
    tl.store(out + 3, tl.load(z_row + column, mask=held, other=0.0).to(tl.float32))
    if HAS_REF:
        MR = tl.max(mr, axis=0)
        tl.store(out + 4, MR)
        tl.store(out + 5, tl.sum(tl.exp2((mr - MR) * scale) * sr, axis=0))
        tl.store(out + 6, tl.sum(_moved(d, ((m - M) - (mr - MR)) * s, a), axis=0))
        tl.store(out + 7, tl.load(zr_row + column, mask=held, other=0.0).to(tl.float32))


@triton.jit
def row_outputs(
    partials,
    labels,
    logprobs,
    ref_logprobs,
    kl,
    entropy,
    logsumexp,
    ref_logsumexp,
    norms,
    rows,
    parts,
    partials_stride,
    all_labels,
    ignore_index,
    temperature,
    HAS_REF: tl.constexpr,
    PARTS: tl.constexpr,
    B: tl.constexpr,
):
    """Six outputs [rows], and norms [4, rows]: M, log s, MR, log sr; B rows a program, PARTS >= parts. Without a
    reference its outputs and the last two norms are not written.

    0 where the label is ignore_index, and NaN log-probs where it is outside [0, all_labels).
    """
    inv_t = 1.0 / temperature
    scale = inv_t * LOG2E
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    there = row < rows
    label = tl.load(labels + row, mask=there, other=ignore_index)
    counts = there & (label != ignore_index)
    known = (label >= 0) & (label < all_labels)
    part = tl.arange(0, PARTS)[None, :]
    base = partials + row[:, None] * partials_stride + part * FIELDS
    held = counts[:, None] & (part < parts)
    m = tl.load(base, mask=held, other=LOWEST)
    s = tl.load(base + 1, mask=held, other=0.0)
    w = tl.load(base + 2, mask=held, other=0.0)
    z_y = tl.sum(tl.load(base + 3, mask=held, other=0.0), axis=1)
    M = tl.max(m, axis=1)
    shift = m - M[:, None]
    a = tl.exp2(shift * scale)
    S = tl.where(counts, tl.sum(a * s, axis=1), 1.0)
    W = tl.sum(_moved(w, shift * s, a), axis=1)
    log_s = tl.log(S)
    z_y = tl.where(known, z_y, float("nan"))
    tl.store(logprobs + row, tl.where(counts, (z_y - M) * inv_t - log_s, 0.0), mask=there)
    tl.store(entropy + row, tl.where(counts, log_s - W * inv_t / S, 0.0), mask=there)
    tl.store(logsumexp + row, tl.where(counts, M * inv_t + log_s, 0.0), mask=there)
    tl.store(norms + row, M, mask=there)
    tl.store(norms + rows + row, log_s, mask=there)
    if HAS_REF:
        mr = tl.load(base + 4, mask=held, other=LOWEST)
        sr = tl.load(base + 5, mask=held, other=0.0)
        d = tl.load(base + 6, mask=held, other=0.0)
        zr_y = tl.sum(tl.load(base + 7, mask=held, other=0.0), axis=1)
        MR = tl.max(mr, axis=1)
        shift_r = mr - MR[:, None]
        SR = tl.where(counts, tl.sum(tl.exp2(shift_r * scale) * sr, axis=1), 1.0)
        D = tl.sum(_moved(d, (shift - shift_r) * s, a), axis=1)
        log_sr = tl.log(SR)
        zr_y = tl.where(known, zr_y, float("nan"))
        tl.store(ref_logprobs + row, tl.where(counts, (zr_y - MR) * inv_t - log_sr, 0.0), mask=there)
        tl.store(kl + row, tl.where(counts, D * inv_t / S + tl.log(SR / S), 0.0), mask=there)
        tl.store(ref_logsumexp + row, tl.where(counts, MR * inv_t + log_sr, 0.0), mask=there)
        tl.store(norms + 2 * rows + row, MR, mask=there)
        tl.store(norms + 3 * rows + row, log_sr, mask=there)


@triton.jit
def row_gradient(
    logits,
    ref_logits,
    labels,
    kl,
    entropy,
    norms,
    g_logprobs,
    g_kl,
    g_entropy,
    g_logsumexp,
    gradient,
    rows,
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    vocab,
    first_label,
    ignore_index,
    temperature,
    HAS_LOGPROBS: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the logits, in `gradient`'s dtype; `gradient` may be `logits`: each place is read once, then written.

    kl, entropy [rows] and norms [4, rows] are those of `row_outputs`; g_* [rows] are the upstream gradients, read where
    the flags say so. What KL costs more than log-probs is the reading of the reference's logits.

        dz_i = [g_lp (1{i = y} - p_i) - g_H p_i (log p_i + H) + g_KL p_i (log p_i - log r_i - KL) + g_lse p_i] / T
    """
    blocks = tl.cdiv(vocab, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, (program % blocks).to(tl.int32)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < vocab
    label = tl.load(labels + row)
    out = gradient + (row // inner) * gradient_outer_stride + (row % inner) * gradient_inner_stride + at
    if label == ignore_index:
        tl.store(out, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=there)
        return
    inv_t = 1.0 / temperature
    z_row = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    z = tl.load(z_row + at, mask=there, other=float("-inf")).to(tl.float32)
    log_p = (z - tl.load(norms + row)) * inv_t - tl.load(norms + rows + row)
    # Finite, so that log p - log r and p log p are; and NaN stays NaN.
    log_p = tl.maximum(log_p, -1e30, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(log_p * LOG2E)
    weight = tl.zeros([BLOCK], tl.float32)
    if HAS_LOGSUMEXP:
        weight += tl.load(g_logsumexp + row)
    if HAS_ENTROPY:
        weight -= tl.load(g_entropy + row) * (log_p + tl.load(entropy + row))
    if HAS_KL:
        zr_row = ref_logits + (row // inner) * ref_outer_stride + (row % inner) * ref_inner_stride
        zr = tl.load(zr_row + at, mask=there, other=float("-inf")).to(tl.float32)
        log_r = (zr - tl.load(norms + 2 * rows + row)) * inv_t - tl.load(norms + 3 * rows + row)
        log_r = tl.maximum(log_r, -1e30, propagate_nan=tl.PropagateNan.ALL)
        weight += tl.load(g_kl + row) * (log_p - log_r - tl.load(kl + row))
    if HAS_LOGPROBS:
        g = tl.load(g_logprobs + row)
        dz = p * (weight - g) + tl.where(at == label - first_label, g, 0.0)
    else:
        dz = p * weight
    tl.store(out, (dz * inv_t).to(gradient.dtype.element_ty), mask=there)
