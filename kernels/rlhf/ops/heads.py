"""Language-model heads: logits of a slice of the vocabulary from hidden states, and what flows back to both.

Logits are float32 even from inputs of 16 bits, unless asked otherwise: rounded to bfloat16, the logits of two models
that almost agree differ by the rounding, and their KL is read wrongly by a factor. A GPU's matrix unit accumulates in
float32 and can write its result so; a CPU needs the inputs converted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.ops.dispatch import uses_triton

PRODUCT_ROWS = 16384


class Head:
    """One model's hidden states [N, H] and output layer, weight [V, H] and bias [V]."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype) -> None:
        self.hidden = hidden if hidden.is_cuda else hidden.to(logits_dtype)
        self.weight = weight
        self.bias = bias
        self.logits_dtype = logits_dtype

    def logits(self, columns: slice, tokens: slice = slice(None)) -> Tensor:
        """[N, columns], memory of its own."""
        logits = product(self.hidden[tokens], self.weight[columns].T, self.logits_dtype)
        return logits if self.bias is None else logits.add_(self.bias[columns])


class HeadGradient:
    """What flows back through a head; sums are float32.

    Args:
        needs: whether the gradient of hidden states, weight and bias is wanted.
        accumulate: whether slices of the weight are seen more than once, and so need a float32 sum.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], *, accumulate: bool = False
    ) -> None:
        in_float32 = not hidden.is_cuda and (hidden.dtype == torch.float16 or uses_triton(hidden))
        self.dtype = torch.float32 if in_float32 else hidden.dtype
        """Of the logits' gradients: matrix units want the inputs' dtype. A CPU has none for float16, and Triton's
        interpreter cuts bfloat16 off where it should round."""
        self._hidden, self._weight = hidden.to(self.dtype), weight
        needs_hidden, needs_weight, needs_bias = needs
        self._accumulate = accumulate

        def new(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape if wanted else 0, dtype=dtype, device=hidden.device)

        self.hidden = new(needs_hidden, *hidden.shape)
        self.weight = new(needs_weight, *weight.shape, dtype=torch.float32 if accumulate else weight.dtype)
        self.bias = new(needs_bias, len(weight))

    def add(self, gradient: Tensor, columns: slice, tokens: slice = slice(None)) -> None:
        """The gradient [tokens, columns] of logits, of `dtype`."""
        if len(self.hidden):
            # Of 16 bits a CPU has no product with a float32 result; each slice's is rounded once, and saves two thirds
            # of the time. Slices of tokens add up in every row of the weight, where that would show.
            rounded = torch.float32 if gradient.is_cuda else self.dtype
            _add_product(self.hidden[tokens], gradient, self._weight[columns].to(self.dtype), rounded)
        if len(self.weight) and self._accumulate:
            _add_product(self.weight[columns], gradient.T, self._hidden[tokens])
        elif len(self.weight) and self.weight.dtype == self.dtype:
            torch.mm(gradient.T, self._hidden[tokens], out=self.weight[columns])
        elif len(self.weight):
            self.weight[columns] = torch.mm(gradient.T, self._hidden[tokens])
        if len(self.bias):
            self.bias[columns] += gradient.sum(0, dtype=torch.float32)


def slices(total: int, width: int, start: int = 0) -> Iterator[slice]:
    """[start, total) in steps of `width`."""
    return (slice(begin, min(begin + width, total)) for begin in range(start, total, width))


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a · b as `dtype`, from sums in at least float32."""
    if a.dtype == dtype == b.dtype:
        return torch.mm(a, b)
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """total += a · b; total is float32, and the product a `dtype`."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
        return
    # In parts, because the product is memory beside the workspace.
    for part in slices(len(total), PRODUCT_ROWS):
        total[part].add_(product(a[part], b, dtype))


def slice_columns(tokens: int, vocab: int, place_bytes: int, limit_bytes: int) -> int:
    """The width of a slice of the vocabulary, a multiple of 128, so that `tokens` rows of it take the limit at most."""
    columns = limit_bytes // max(1, tokens * place_bytes) // 128 * 128
    return max(128, min(columns, -(-vocab // 128) * 128))


def default_workspace_bytes(device: torch.device) -> int:
    """2 GiB on a GPU, 384 MiB elsewhere."""
    return 2**31 if device.type == "cuda" else 3 * 2**27
