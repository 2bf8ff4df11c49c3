"""What the public functions ask of their arguments. A message names argument, rule and what was received."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ops.dispatch import uses_triton


def check_labels(labels: Tensor, shape: torch.Size, device: torch.device, vocab: int, ignore_index: int) -> None:
    """
    Raises:
        ValueError: shape, dtype, device, or, where that can be seen without waiting for a GPU, a label outside the
            vocabulary. (Elsewhere such a label's log-prob is NaN.)
    """
    if labels.shape != shape:
        raise ValueError(f"labels: shape {tuple(shape)} expected, {tuple(labels.shape)} received")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: int64 expected, {_name(labels.dtype)} received")
    if labels.device != device:
        raise ValueError(f"labels: device {device} expected, {labels.device} received")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab))]
    if len(wrong):
        raise ValueError(f"labels: within [0, {vocab}) or {ignore_index} expected, {int(wrong[0])} received")


def check_temperature(temperature: float) -> None:
    """
    Raises:
        ValueError: not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: must be > 0, {temperature} received")


def check_matrix(name: str, matrix: Tensor, *, least_dim: int = 2, like: Tensor | None = None) -> None:
    """
    Args:
        least_dim: dimensions that it must have.
        like: shape and device must be this one's.

    Raises:
        ValueError: dtype, shape or strides.
    """
    allowed = [torch.float32, torch.bfloat16, torch.float16]
    if not uses_triton(matrix):
        allowed.append(torch.float64)
    if matrix.dtype not in allowed:
        raise ValueError(f"{name}: {' or '.join(map(_name, allowed))} expected, {_name(matrix.dtype)} received")
    if matrix.dim() < least_dim or matrix.shape[-1] < 1:
        raise ValueError(
            f"{name}: at least {least_dim} dimension(s), the last not empty, expected, {tuple(matrix.shape)} received"
        )
    if matrix.stride(-1) != 1 and matrix.shape[-1] > 1:
        raise ValueError(
            f"{name}: a contiguous last dimension (stride 1) expected, stride {matrix.stride(-1)} received; "
            "call .contiguous() where a copy is acceptable"
        )
    if like is not None and matrix.shape != like.shape:
        raise ValueError(f"{name}: shape {tuple(like.shape)} expected, {tuple(matrix.shape)} received")
    if like is not None and matrix.device != like.device:
        raise ValueError(f"{name}: device {like.device} expected, {matrix.device} received")


def check_head(
    prefix: str, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype
) -> None:
    """
    Args:
        prefix: of the arguments' names, "" or "ref_".

    Raises:
        ValueError: dtypes, shapes, devices or strides do not fit.
    """
    check_matrix(f"{prefix}hidden_states", hidden_states)
    check_matrix(f"{prefix}lm_head_weight", weight)
    dtype, width = hidden_states.dtype, hidden_states.shape[-1]
    if dtype == torch.float64:
        raise ValueError(f"{prefix}hidden_states: float32 or bfloat16 or float16 expected, float64 received")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{prefix}lm_head_weight: shape (V, {width}) expected, {tuple(weight.shape)} received")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}lm_head_bias: shape ({len(weight)},) expected, {tuple(bias.shape)} received")
    for name, tensor in ((f"{prefix}lm_head_weight", weight), (f"{prefix}lm_head_bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (dtype, hidden_states.device):
            raise ValueError(
                f"{name}: {_name(dtype)} on {hidden_states.device} expected, as the hidden states are, "
                f"{_name(tensor.dtype)} on {tensor.device} received"
            )
    if logits_dtype not in (torch.float32, dtype):
        raise ValueError(f"logits_dtype: float32 or {_name(dtype)} expected, {_name(logits_dtype)} received")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
