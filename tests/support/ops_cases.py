"""Inputs for `rlhf.ops`, and the rule by which its results are judged.

The same tests run on whatever there is: plain torch on a CPU, Triton's interpreter (TRITON_INTERPRET=1), or a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.ops import LogprobOutput
from rlhf.ops.dispatch import uses_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = uses_triton(torch.zeros(1, device=DEVICE))
"""Whether the functions under test run through the kernels."""

# Relative to the largest. Triton's interpreter cuts off what a bfloat16 cannot hold, where a GPU rounds to nearest: its
# error is up to twice as large.
INTERPRETED = KERNELS and DEVICE == "cpu"
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}


def case(
    rows: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 3.0,
    apart: float = 0.5,
    shift: float = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the reference's logits [rows, vocab] and labels [rows]; the second label is ignored."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    ref_logits = logits + apart * torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1] = -100
    return ((logits + shift).to(DEVICE, dtype), (ref_logits + shift).to(DEVICE, dtype), labels.to(DEVICE))


def upstream(shape: torch.Size) -> list[Tensor]:
    """Gradients of the loss by logprobs, kl, entropy and logsumexp, different for every token."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(4)]


def loss(output: LogprobOutput, weights: list[Tensor]) -> Tensor:
    """A scalar that depends on every differentiable output."""
    assert output.kl is not None
    assert output.entropy is not None
    assert output.logsumexp is not None
    parts = (output.logprobs, output.kl, output.entropy, output.logsumexp)
    return torch.stack([(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]).sum()


def assert_no_worse(found: Tensor, plain: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    """The error is at most that of plain torch in the same dtype, plus `tolerance` (cut-cross-entropy's criterion)."""
    assert found.shape == truth.shape, what
    assert found.isfinite().all(), f"{what}: {found}"
    own = (found.double() - truth).abs().max().item()
    allowed = (plain.double() - truth).abs().max().item() + tolerance
    assert own <= allowed, f"{what}: error {own:.2e}, allowed {allowed:.2e}"


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a scalar function, by all of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)
