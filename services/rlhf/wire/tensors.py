"""numpy arrays <-> `Tensor` and `RaggedTensor`. Decoding never copies: the array is a read-only view of the message.

Hidden states stay bytes: numpy has no bfloat16, and only who has torch computes with them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rlhf.errors import RequestError
from rlhf.v1 import tensor_pb2
from rlhf.wire.records import Blob, HiddenStates

_TO_NUMPY: dict[int, np.dtype[Any]] = {
    tensor_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DTYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DTYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DTYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DTYPE_BOOL: np.dtype("?"),
}
_FROM_NUMPY = {dtype: number for number, dtype in _TO_NUMPY.items()}

_HIDDEN: dict[str, tuple[Any, np.dtype[Any], int]] = {
    "float32": (tensor_pb2.DTYPE_FLOAT32, np.dtype("<u4"), 0x7F800000),
    "bfloat16": (tensor_pb2.DTYPE_BFLOAT16, np.dtype("<u2"), 0x7F80),
    "float16": (tensor_pb2.DTYPE_FLOAT16, np.dtype("<u2"), 0x7C00),
}
"""Of hidden states' dtypes: the wire's number, unsigned integers of their size, and the bits of their exponent."""
_HIDDEN_NAMES = {number: name for name, (number, _, _) in _HIDDEN.items()}


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


def to_hidden_states(hidden: HiddenStates) -> tensor_pb2.Tensor:
    message = tensor_pb2.Tensor(dtype=_HIDDEN[hidden.dtype][0], shape=hidden.shape)
    if isinstance(hidden.content, Blob):
        blob = hidden.content
        message.blob.CopyFrom(tensor_pb2.Blob(uri=blob.uri, size_bytes=blob.size_bytes, sha256=blob.sha256))
    else:
        message.data = hidden.content
    return message


def from_hidden_states(message: tensor_pb2.Tensor, name: str) -> HiddenStates:
    """The hidden states in a Tensor, [R, H]. What a blob holds is for whoever reads it to check.

    Raises:
        RequestError: no matrix of float32, bfloat16 or float16, a size that is not its shape's, a blob without its
            hash, or inline content that is not finite.
    """
    if message.WhichOneof("content") is None:
        raise RequestError(f"{name}: a tensor is required and none was sent")
    dtype = _HIDDEN_NAMES.get(message.dtype)
    if dtype is None:
        raise RequestError(f"{name}: dtype {_dtype_name(message.dtype)} is not accepted here")
    if len(message.shape) != 2:
        raise RequestError(f"{name}: 2 dimensions expected, shape {list(message.shape)} received")
    hidden = HiddenStates(dtype, (message.shape[0], message.shape[1]), _hidden_content(message, name))
    _check_size(hidden, name)
    if not finite(hidden):
        raise RequestError(f"{name}: not finite")
    return hidden


def finite(hidden: HiddenStates) -> bool:
    """Whether no entry is infinite or NaN, seen from the bits; true of a blob, whose content is not here."""
    if isinstance(hidden.content, Blob):
        return True
    _, integers, exponent = _HIDDEN[hidden.dtype]
    return not bool(((np.frombuffer(hidden.content, integers) & exponent) == exponent).any())


def _hidden_content(message: tensor_pb2.Tensor, name: str) -> bytes | Blob:
    if message.WhichOneof("content") == "data":
        return message.data
    blob = Blob(message.blob.uri, message.blob.size_bytes, message.blob.sha256)
    if not re.fullmatch("[0-9a-f]{64}", blob.sha256):
        raise RequestError(f"{name}: a blob's sha256 has 64 hexadecimal digits in lower case, {blob.sha256!r} received")
    return blob


def _check_size(hidden: HiddenStates, name: str) -> None:
    expected_bytes = math.prod(hidden.shape) * _HIDDEN[hidden.dtype][1].itemsize
    content = hidden.content
    size_bytes = content.size_bytes if isinstance(content, Blob) else len(content)
    if size_bytes != expected_bytes:
        raise RequestError(
            f"{name}: shape {list(hidden.shape)} of {hidden.dtype} takes {expected_bytes} bytes, {size_bytes} received"
        )
