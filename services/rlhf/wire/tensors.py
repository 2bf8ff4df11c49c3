"""numpy arrays <-> `Tensor` and `RaggedTensor`. Decoding never copies: the array is a read-only view of the message."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rlhf.errors import RequestError
from rlhf.v1 import tensor_pb2

_TO_NUMPY: dict[int, np.dtype[Any]] = {
    tensor_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DTYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DTYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DTYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DTYPE_BOOL: np.dtype("?"),
}
_FROM_NUMPY = {dtype: number for number, dtype in _TO_NUMPY.items()}


def to_tensor(array: NDArray[Any], dtype: DTypeLike | None = None) -> tensor_pb2.Tensor:
    """An array of any shape as a Tensor, converted to `dtype` first where one is given."""
    array = np.asarray(array, dtype=dtype)
    little_endian = array.dtype.newbyteorder("<")
    if little_endian not in _FROM_NUMPY:
        raise TypeError(f"a Tensor holds {', '.join(str(d) for d in _FROM_NUMPY)}; this array is {array.dtype}")
    data = array.astype(little_endian, copy=False).tobytes()
    return tensor_pb2.Tensor(dtype=_FROM_NUMPY[little_endian], shape=array.shape, data=data)  # type: ignore[arg-type]


def from_tensor(message: tensor_pb2.Tensor, name: str, *, dtypes: str = "", ndim: int | None = None) -> NDArray[Any]:
    """The array in a Tensor.

    Args:
        name: the field's name, for errors.
        dtypes: numpy kinds that are accepted ("i": integers, "f": floats, "b": bool); empty: all.
        ndim: number of dimensions that is accepted; None: any.

    Raises:
        RequestError: the message is no valid Tensor of that kind.
    """
    kind = message.WhichOneof("content")
    if kind is None:
        raise RequestError(f"{name}: a tensor is required and none was sent")
    if kind == "blob":
        raise RequestError(f"{name}: this field takes inline data, not a blob")
    dtype = _TO_NUMPY.get(message.dtype)
    if dtype is None or (dtypes and dtype.kind not in dtypes):
        raise RequestError(f"{name}: dtype {_dtype_name(message.dtype)} is not accepted here")
    if ndim is not None and len(message.shape) != ndim:
        raise RequestError(f"{name}: {ndim} dimension(s) expected, shape {list(message.shape)} received")
    return _as_array(message.data, dtype, tuple(message.shape), name)


def _as_array(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> NDArray[Any]:
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) != expected_bytes:
        raise RequestError(f"{name}: shape {list(shape)} of {dtype} takes {expected_bytes} bytes, {len(data)} received")
    flat = np.frombuffer(data, dtype=dtype)
    if dtype.kind == "b" and flat.size and flat.view(np.uint8).max() > 1:
        raise RequestError(f"{name}: a bool is 0 or 1, and {flat.view(np.uint8).max()} was received")
    try:
        return flat.reshape(shape)
    except ValueError as error:  # more dimensions, or larger empty ones, than numpy has
        raise RequestError(f"{name}: no array has the shape {list(shape)} ({error})") from error


def _dtype_name(number: int) -> str:
    """A proto3 enum may hold numbers that this program does not know."""
    return tensor_pb2.DType.Name(number) if number in tensor_pb2.DType.values() else str(number)  # type: ignore[arg-type]


def to_ragged(sequences: Sequence[NDArray[Any]], dtype: DTypeLike) -> tensor_pb2.RaggedTensor:
    """N one-dimensional arrays, packed end to end."""
    cu_seqlens = np.cumsum([0, *(len(sequence) for sequence in sequences)], dtype=np.int64)
    values = np.concatenate(sequences) if sequences else np.zeros(0)
    return tensor_pb2.RaggedTensor(values=to_tensor(values, dtype), cu_seqlens=to_tensor(cu_seqlens))


def from_ragged(message: tensor_pb2.RaggedTensor, name: str, *, dtypes: str = "") -> list[NDArray[Any]]:
    """The N arrays in a RaggedTensor, as views.

    Raises:
        RequestError: the message is no valid RaggedTensor.
    """
    values = from_tensor(message.values, f"{name}.values", dtypes=dtypes, ndim=1)
    cu_seqlens = from_tensor(message.cu_seqlens, f"{name}.cu_seqlens", dtypes="i", ndim=1)
    rises = len(cu_seqlens) >= 1 and cu_seqlens[0] == 0 and bool(np.all(cu_seqlens[1:] >= cu_seqlens[:-1]))
    if not rises or cu_seqlens[-1] != len(values):
        raise RequestError(f"{name}.cu_seqlens: must rise from 0 to the number of values, {len(values)}")
    return [values[start:end] for start, end in itertools.pairwise(cu_seqlens)]
