"""What the GPU can do: copies, reads, and matrix products of a case's own shapes, each measured beside the case.

A ceiling is a sum of such parts, and none of it overlaps: so much time for the products that a case cannot do without,
and so much for the bytes that its kernels over rows must read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.shapes import Shape
from gpu.timing import Way

LARGE_BYTES = 2**31
BLOCK, EACH = 8192, 131072

Product = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """`times` times the way's time; for bytes, as many as it takes at the way's speed."""

    way: Way
    times: float


class Ceilings:
    """The ways of one shape, made when first asked for."""

    def __init__(self, shape: Shape, device: torch.device, *, tiny: bool) -> None:
        self._shape, self._device = shape, device
        self._bytes = 2**20 if tiny else LARGE_BYTES
        self._buffers: dict[str, Tensor] = {}

    def copied(self, traffic_bytes: float) -> Part:
        """Reading and writing: the bytes of both."""
        source, target = self._buffer("source"), self._buffer("target")
        return Part(_way("copy", lambda: target.copy_(source)), traffic_bytes / (2 * self._bytes))

    def read(self, traffic_bytes: float) -> Part:
        """Reading alone."""
        source = self._buffer("source")
        return Part(_way("read", lambda: _read(source)), traffic_bytes / self._bytes)

    def logits_product(self, times: int, dtype: torch.dtype = torch.float32) -> Part:
        """hidden · weightᵀ."""
        tokens, hidden, vocab = self._shape.sizes
        a, b = self._matrix(tokens, hidden), self._matrix(vocab, hidden)
        return Part(_way(f"logits product, {_name(dtype)} output", lambda: _product(a, b.T, dtype)), times)

    def weight_gradient_product(self) -> Part:
        """gradientᵀ · hidden, bfloat16."""
        tokens, hidden, vocab = self._shape.sizes
        a, b = self._matrix(tokens, vocab), self._matrix(tokens, hidden)
        return Part(_way("weight gradient's product, bfloat16 output", lambda: torch.mm(a.T, b)), 1)

    def hidden_gradient_product(self) -> Part:
        """gradient · weight, float32."""
        tokens, hidden, vocab = self._shape.sizes
        a, b = self._matrix(tokens, vocab), self._matrix(vocab, hidden)
        name = "hidden states' gradient's product, float32 output"
        return Part(_way(name, lambda: _product(a, b, torch.float32)), 1)

    def speeds(self, medians_ms: dict[str, float]) -> dict[str, float]:
        """TB/s and TFLOP/s of those ways that were measured."""
        flop = 2 * float(self._shape.tokens) * self._shape.hidden * self._shape.vocab
        speeds = {f"{name}, TFLOP/s": flop / ms / 1e9 for name, ms in medians_ms.items() if "product" in name}
        for name, traffic in (("copy", 2 * self._bytes), ("read", self._bytes)):
            if name in medians_ms:
                speeds[f"{name}, TB/s"] = traffic / medians_ms[name] / 1e9
        return speeds

    def _buffer(self, name: str) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.ones(self._bytes // 4, device=self._device)
        return self._buffers[name]

    def _matrix(self, rows: int, columns: int) -> Tensor:
        name = f"{rows} x {columns}"
        if name not in self._buffers:
            random = torch.Generator(self._device).manual_seed(5)
            # Numbers like a model's: products of zeros draw less power, and so run at higher clocks.
            self._buffers[name] = torch.randn(
                rows, columns, generator=random, device=self._device, dtype=torch.bfloat16
            )
        return self._buffers[name]


def total_ms(parts: Sequence[Part], medians_ms: dict[str, float]) -> float:
    return sum(part.times * medians_ms[part.way.name] for part in parts)


def _way(name: str, run: Product) -> Way:
    return Way(name, lambda _: run)


def _read(source: Tensor) -> Tensor:
    if not source.is_cuda:
        return source.sum()
    from gpu.read_kernel import read

    programs = source.numel() // EACH
    sums = torch.empty(programs, device=source.device)
    read[(programs,)](source, sums, EACH, BLOCK=BLOCK, num_warps=8)
    return sums


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.is_cuda and dtype != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
