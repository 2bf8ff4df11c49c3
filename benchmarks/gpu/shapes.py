"""The sizes at which is measured, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROTATED_BYTES = 2**30
"""Inputs of a smaller set might stay in a cache from one sample to the next."""
SETS = 4


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocab: int
    judged: bool = False
    """Whether the bars apply."""

    def __str__(self) -> str:
        return f"{self.tokens} x {self.hidden} x {self.vocab}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From tokens x hidden x vocabulary, as `8192x4096x128256`."""
        tokens, hidden, vocab = (int(part) for part in text.split("x"))
        given = cls(tokens, hidden, vocab)
        return next((shape for shape in SHAPES if (tokens, hidden, vocab) == shape.sizes), given)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.tokens, self.hidden, self.vocab


SHAPES = (
    Shape(8192, 4096, 128256, judged=True),
    Shape(8192, 4096, 151936, judged=True),
    *(Shape(tokens, 4096, 128256) for tokens in (1024, 2048, 4096, 16384, 32768)),
)
TINY = (Shape(48, 32, 500),)


@dataclass(frozen=True)
class Logits:
    """Two models' logits, bfloat16 [N, V]."""

    logits: Tensor
    ref_logits: Tensor
    labels: Tensor
    g_logprobs: Tensor
    """The upstream gradients, float32 [N]: those of a sum of -logprob, so that a cross-entropy has the same."""
    g_kl: Tensor


@dataclass(frozen=True)
class Linear:
    """Two models' hidden states [N, H] and output layers [V, H], bfloat16."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor
    g_logprobs: Tensor
    g_kl: Tensor
    advantages: Tensor
    old_logprobs: Tensor


def logits_sets(shape: Shape, device: torch.device) -> list[Logits]:
    """Several, unless one is too large for any cache."""
    set_bytes = 4 * shape.tokens * shape.vocab
    return [_logits(shape, device, seed) for seed in range(SETS if set_bytes < ROTATED_BYTES else 1)]


def linear_sets(shape: Shape, device: torch.device) -> list[Linear]:
    """Four batches for one pair of output layers."""
    random = torch.Generator(device).manual_seed(99)
    size = (shape.vocab, shape.hidden)
    weight = _normal(size, random).mul_(3 / shape.hidden**0.5)
    ref_weight = weight.detach() + _normal(size, random).mul_(0.1 / shape.hidden**0.5)
    return [_linear(shape, weight, ref_weight, seed) for seed in range(SETS)]


def _logits(shape: Shape, device: torch.device, seed: int) -> Logits:
    random = torch.Generator(device).manual_seed(seed)
    size = (shape.tokens, shape.vocab)
    logits = _normal(size, random).mul_(3)
    ref_logits = _normal(size, random).mul_(0.1).add_(logits)
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=random, device=device)
    return Logits(logits, ref_logits, labels, *_upstream(shape.tokens, device))


def _linear(shape: Shape, weight: Tensor, ref_weight: Tensor, seed: int) -> Linear:
    random = torch.Generator(weight.device).manual_seed(seed)
    size, device = (shape.tokens, shape.hidden), weight.device
    hidden = _normal(size, random)
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=random, device=device)
    advantages = torch.randn(shape.tokens, generator=random, device=device)
    # About the log-probs, so that ratios lie within, above and below the clip range.
    picked = (hidden.float() * weight.detach()[labels].float()).sum(-1)
    old_logprobs = picked - 4.5 - torch.tensor(shape.vocab).log().item() + 0.3 * advantages.roll(1)
    return Linear(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        (hidden.detach() + _normal(size, random).mul_(0.05)),
        ref_weight,
        labels,
        *_upstream(shape.tokens, device),
        advantages,
        old_logprobs,
    )


def _upstream(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.full((tokens,), -1.0, device=device), torch.full((tokens,), 0.1, device=device)


def _normal(size: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(size, generator=random, device=random.device, dtype=torch.bfloat16)
