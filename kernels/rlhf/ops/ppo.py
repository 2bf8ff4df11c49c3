"""PPO's loss from hidden states, with its gradient computed on the way: no logits are computed twice.

    for each slice of the tokens:
        logits = hidden[slice] · weightᵀ, and the reference's
        log-probs, entropy, KL                     rows.partials, parallel.merge
        loss, and its gradient by these            losses.ppo_loss, the trainer's own
        gradient of the logits                     rows.gradient
        d hidden[slice] = gradient · weight        d weight += gradientᵀ · hidden[slice]

`linear.fused_linear_logprobs` with the same loss is the alternative in less memory: it computes the logits twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.ops import linear, parallel, rows
from rlhf.ops.checks import check_labels, check_temperature
from rlhf.ops.dispatch import uses_triton
from rlhf.ops.heads import Head, HeadGradient, default_workspace_bytes, slices
from rlhf.ops.losses import PpoTerms, ppo_loss
from rlhf.ops.output import LogprobOutput


class PpoLossOutput(NamedTuple):
    """The loss, and of each token what it was made of (no gradient flows to these)."""

    loss: Tensor
    """Scalar float32, the sum over tokens."""
    tokens: LogprobOutput
    clipped_mask: Tensor
    """bool: whether the clip held the ratio back."""


PLAIN = PpoTerms()


def fused_linear_ppo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    terms: PpoTerms = PLAIN,
    ref_logprobs: Tensor | None = None,
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
) -> PpoLossOutput:
    """`losses.ppo_loss` of `fused_linear_logprobs`, in one pass.

    With k models and b bytes a logit it needs, beside inputs and results, (k · b + bytes of the hidden states' dtype) ·
    rows · V for the rows that fit into the workspace, 4 · N · H for the gradient of the hidden states, and 4 · V · H
    for that of the weight unless it is frozen.

    Args:
        old_logprobs, advantages: float32 of the labels' shape; read where the label is not ignored.
        terms: clip ranges, KL and entropy.
        ref_logprobs: of the labels' shape, for a KL estimator without the reference's hidden states.
        workspace_bytes: for logits and their gradients; at least 16 rows are computed at once. None: 2 GiB on a GPU,
            384 MiB elsewhere.
        others: see `fused_linear_logprobs`; the tokens that count are those whose label is not ignored.

    Raises:
        ValueError: names the argument, the rule and what was received.
    """
    policy, reference = linear.layers(
        (hidden_states, lm_head_weight, lm_head_bias),
        (ref_hidden_states, ref_lm_head_weight, ref_lm_head_bias),
        logits_dtype,
    )
    vocab = linear.vocabulary(len(lm_head_weight), valid_vocab_size, process_group)
    check_labels(labels, hidden_states.shape[:-1], hidden_states.device, vocab, ignore_index)
    check_temperature(temperature)
    for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages), ("ref_logprobs", ref_logprobs)):
        if tensor is not None and tensor.shape != labels.shape:
            raise ValueError(f"{name}: shape {tuple(labels.shape)} expected, {tuple(tensor.shape)} received")
    _check_terms(terms, ref_logprobs, reference)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in policy]
    if not any(needs):
        # Without a gradient slices of the vocabulary compute nothing twice either, and take less memory.
        tokens = linear.fused_linear_logprobs(
            hidden_states, lm_head_weight, labels, ref_hidden_states=ref_hidden_states,
            ref_lm_head_weight=ref_lm_head_weight, lm_head_bias=lm_head_bias, ref_lm_head_bias=ref_lm_head_bias,
            temperature=temperature, ignore_index=ignore_index, valid_vocab_size=valid_vocab_size,
            logits_dtype=logits_dtype, workspace_bytes=workspace_bytes, process_group=process_group,
        )  # fmt: skip
        tokens = _with_given(tokens, ref_logprobs, labels == ignore_index)
        loss, clipped_mask = ppo_loss(tokens, old_logprobs.float(), advantages.float(), labels != ignore_index, terms)
        return PpoLossOutput(loss, tokens, clipped_mask)
    found = _loss(
        *linear.flattened(policy), labels.reshape(-1).contiguous(), *linear.flattened(reference or (None, None, None)),
        old_logprobs.detach().reshape(-1).float(), advantages.detach().reshape(-1).float(),
        None if ref_logprobs is None else ref_logprobs.detach().reshape(-1).float(), needs,
        terms.clip_low, terms.clip_high, terms.kl_coef, terms.kl_estimator, terms.entropy_coef, terms.dual_clip,
        terms.ratio, temperature, ignore_index, vocab, logits_dtype,
        default_workspace_bytes(hidden_states.device) if workspace_bytes is None else workspace_bytes,
        parallel.group_name(process_group),
    )  # fmt: skip
    logprobs, ref, kl, entropy, logsumexp, ref_logsumexp = found[5:]
    outputs = rows.RowOutputs(logprobs, ref, kl, entropy, logsumexp, ref_logsumexp, norms=found[0])
    tokens = _with_given(linear.shaped(outputs, labels.shape), ref_logprobs, labels == ignore_index)
    return PpoLossOutput(found[0], tokens, found[4].view(labels.shape))


def _with_given(tokens: LogprobOutput, ref_logprobs: Tensor | None, ignored_mask: Tensor) -> LogprobOutput:
    """The reference's log-probs are the caller's, where its hidden states did not give them."""
    if ref_logprobs is None or tokens.ref_logprobs is not None:
        return tokens
    return tokens._replace(ref_logprobs=torch.where(ignored_mask, 0.0, ref_logprobs.float()))


def _check_terms(terms: PpoTerms, ref_logprobs: Tensor | None, reference: object) -> None:
    if not terms.kl_coef or reference is not None:
        return
    if terms.kl_estimator == "exact":
        raise ValueError("terms.kl_estimator: 'exact' needs ref_hidden_states")
    if ref_logprobs is None:
        raise ValueError(f"terms.kl_estimator: {terms.kl_estimator!r} needs ref_logprobs or ref_hidden_states")


@torch.library.custom_op("rlhf::linear_ppo_loss", mutates_args=())
def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    needs: list[bool],
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    dual_clip: float | None,
    ratio: bool,
    temperature: float,
    ignore_index: int,
    vocab: int,
    logits_dtype: torch.dtype,
    workspace_bytes: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; gradients of hidden states, weight, bias; the clipped mask; six fields of rows.RowOutputs."""
    terms = PpoTerms(clip_low, clip_high, kl_coef, kl_estimator, entropy_coef, dual_clip, ratio)  # type: ignore[arg-type]
    has_ref = ref_hidden is not None
    with torch.autocast(hidden.device.type, enabled=False):
        process_group = parallel.resolve(group)
        head, ref_head = linear.heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logits_dtype)
        at_once = _rows_at_once(head, has_ref, workspace_bytes)
        found = HeadGradient(hidden, weight, (needs[0], needs[1], needs[2]), accumulate=len(hidden) > at_once)
        outputs = rows.new_outputs(len(hidden), has_ref, hidden.device)
        clipped_mask = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in slices(len(hidden), at_once):
            share = linear.share(labels[part], temperature, ignore_index, vocab, len(weight), process_group)
            chunk = _Chunk(head, ref_head, part, *share, process_group)
            mask = labels[part] != ignore_index
            own, upstream, clipped = _upstream(
                chunk.outputs, None if ref_logprobs is None else ref_logprobs[part], old_logprobs[part],
                advantages[part], mask, terms,
            )  # fmt: skip
            loss += own
            clipped_mask[part] = clipped
            for all_rows, some in zip(outputs[:6], chunk.outputs[:6], strict=True):
                if len(all_rows):
                    all_rows[part] = some
            if any(needs):
                found.add(chunk.gradient(upstream, found.dtype), chunk.columns, part)
            # Or its logits would live on beside the next chunk's.
            del chunk
        parallel.sum_(found.hidden, process_group)
    return (
        loss,
        found.hidden.to(hidden.dtype),
        found.weight.to(weight.dtype),
        found.bias.to(weight.dtype),
        clipped_mask,
        *outputs[:6],
    )


class _Chunk:
    """Some tokens' logits over this process's share of the labels."""

    def __init__(
        self,
        head: Head,
        ref_head: Head | None,
        tokens: slice,
        of: rows.Distribution,
        first_label: int,
        own_labels: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.of, self.first_label, self.columns = of, first_label, slice(0, own_labels)
        self.logits = head.logits(self.columns, tokens)
        self.ref_logits = None if ref_head is None else ref_head.logits(self.columns, tokens)
        partials = rows.new_partials(len(of.labels), rows.parts(self.logits) if own_labels else 1, self.logits.device)
        if own_labels:
            rows.partials(self.logits, self.ref_logits, of, first_label, partials)
        else:
            rows.clear(partials)
        self.outputs = parallel.merge(partials, of, ref_head is not None, group)

    def gradient(self, upstream: rows.Upstream, dtype: torch.dtype) -> Tensor:
        """Of the logits, [tokens, columns]; over the logits where the dtype is theirs."""
        out = self.logits if self.logits.dtype == dtype else torch.empty_like(self.logits, dtype=dtype)
        if self.logits.shape[1]:
            rows.gradient(self.logits, self.ref_logits, self.of, self.first_label, self.outputs, upstream, out)
        return out


def _upstream(
    outputs: rows.RowOutputs,
    ref_logprobs: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    terms: PpoTerms,
) -> tuple[Tensor, rows.Upstream, Tensor]:
    """The loss of some tokens, its gradient by their outputs, and the clipped mask."""
    has_ref = bool(len(outputs.kl)) or not len(outputs.logprobs)
    with _autograd():
        logprobs, entropy = (x.detach().requires_grad_() for x in (outputs.logprobs, outputs.entropy))
        kl = outputs.kl.detach().requires_grad_() if has_ref else None
        ref = outputs.ref_logprobs.detach() if has_ref else ref_logprobs
        tokens = LogprobOutput(logprobs, ref_logprobs=ref, kl=kl, entropy=entropy)
        loss, clipped_mask = ppo_loss(tokens, old_logprobs, advantages, mask, terms)
        leaves = {"logprobs": logprobs, "entropy": entropy} | ({} if kl is None else {"kl": kl})
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), rows.Upstream(**dict(zip(leaves, grads, strict=True))), clipped_mask


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd within a custom operator, whose body runs below it: the loss is differentiated by its one definition,
    not by a second formula. The guard is torch's own and not public; without it the gradient is refused, never wrong.
    """
    keys = torch._C.DispatchKey
    with (
        torch.enable_grad(),
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
    ):
        yield


def _rows_at_once(head: Head, has_ref: bool, workspace_bytes: int) -> int:
    """How many tokens' logits and gradients fit into the workspace."""
    row_bytes = len(head.weight) * ((2 if has_ref else 1) * head.logits_dtype.itemsize + head.weight.element_size())
    if not uses_triton(head.weight):
        # Plain torch holds exponentials beside the logits.
        row_bytes *= 2
    return max(16, workspace_bytes // row_bytes // 16 * 16)


@_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ref_hidden: Any, *rest: Any) -> Any:
    needs = rest[5]

    def new(like: Tensor, wanted: bool) -> Tensor:
        return like.new_empty(like.shape if wanted else 0)

    outputs = rows.new_outputs(len(labels), ref_hidden is not None, hidden.device)
    return (
        hidden.new_empty((), dtype=torch.float32),
        new(hidden, needs[0]),
        new(weight, needs[1]),
        weight.new_empty(len(weight) if needs[2] else 0),
        hidden.new_empty(len(labels), dtype=torch.bool),
        *outputs[:6],
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[10]
    ctx.save_for_backward(*output[1:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = (None, None, None)
    if g_loss is not None:
        found = tuple(
            g * g_loss.to(g.dtype) if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.needs, strict=True)
        )
    return *found, *([None] * 21)


_loss.register_autograd(_backward, setup_context=_keep)
