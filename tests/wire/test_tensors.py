from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rlhf.errors import RequestError
from rlhf.v1 import tensor_pb2
from rlhf.wire.records import Blob, HiddenStates
from rlhf.wire.tensors import (
    finite,
    from_hidden_states,
    from_ragged,
    from_tensor,
    to_hidden_states,
    to_ragged,
    to_tensor,
)

DTYPES = st.sampled_from(["<f4", "<f2", "<i4", "<i8", "?", ">f4", ">i4"])


@given(arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_any_array_comes_back_as_it_was(array: np.ndarray) -> None:
    message = tensor_pb2.Tensor.FromString(to_tensor(array).SerializeToString())
    back = from_tensor(message, "x")
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back.tobytes() == array.astype(back.dtype).tobytes(), "bit for bit, NaN included"
    assert not back.flags.writeable


def test_layout_in_memory_does_not_matter() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    for view in (array.T, array[:, ::2], array[::-1]):
        np.testing.assert_array_equal(from_tensor(to_tensor(view), "x"), view)


def test_bytes_are_little_endian_and_in_c_order() -> None:
    message = to_tensor(np.array([[1, 2], [3, 4]], dtype=">i4"))
    assert message.data.hex() == "01000000020000000300000004000000"
    assert list(message.shape) == [2, 2]


def test_converts_on_the_way_out_and_refuses_what_it_cannot_hold() -> None:
    assert to_tensor(np.array([1, 2]), np.int32).dtype == tensor_pb2.DTYPE_INT32
    with pytest.raises(TypeError, match="this array is float64"):
        to_tensor(np.zeros(2))


def tensor(**changes: object) -> tensor_pb2.Tensor:
    fields: dict[str, object] = {"dtype": tensor_pb2.DTYPE_INT32, "shape": [2], "data": b"\0" * 8}
    return tensor_pb2.Tensor(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (tensor_pb2.Tensor(), "required and none was sent"),
        (tensor_pb2.Tensor(blob=tensor_pb2.Blob(uri="file:///x")), "inline data, not a blob"),
        (tensor(data=b"\0" * 7), r"shape \[2\] of int32 takes 8 bytes, 7 received"),
        (tensor(shape=[]), "1 dimension"),
        (tensor(shape=[2, 1]), "1 dimension"),
        (tensor(shape=[2**32 - 1]), "17179869180 bytes, 8 received"),
        (tensor(dtype=tensor_pb2.DTYPE_BFLOAT16), "DTYPE_BFLOAT16 is not accepted"),
        (tensor(dtype=tensor_pb2.DTYPE_FLOAT32), "DTYPE_FLOAT32 is not accepted"),
        (tensor(dtype=tensor_pb2.DTYPE_UNSPECIFIED), "DTYPE_UNSPECIFIED is not accepted"),
        (tensor(dtype=77), "dtype 77 is not accepted"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(message: tensor_pb2.Tensor, sentence: str) -> None:
    with pytest.raises(RequestError, match=rf"^ids: .*{sentence}"):
        from_tensor(message, "ids", dtypes="i", ndim=1)


def test_shapes_that_numpy_has_not_are_refused() -> None:
    for shape in ([1] * 70, [0, *[2**32 - 1] * 3]):
        size = 0 if shape[0] == 0 else 4
        with pytest.raises(RequestError, match="no array has the shape"):
            from_tensor(tensor(shape=shape, data=b"\0" * size), "x")


def test_a_bool_is_zero_or_one() -> None:
    good = tensor(dtype=tensor_pb2.DTYPE_BOOL, shape=[3], data=b"\1\0\1")
    assert from_tensor(good, "x").sum() == 2
    with pytest.raises(RequestError, match="a bool is 0 or 1, and 2 was received"):
        from_tensor(tensor(dtype=tensor_pb2.DTYPE_BOOL, shape=[3], data=b"\1\0\2"), "x")


@given(st.integers(0, 9), st.lists(st.integers(0, 3), max_size=3), st.binary(max_size=20))
def test_any_tensor_gives_an_array_or_a_request_error(dtype: int, shape: list[int], data: bytes) -> None:
    message = tensor(dtype=dtype, shape=shape, data=data)
    try:
        array = from_tensor(message, "x")
    except RequestError:
        return
    assert array.shape == tuple(shape)
    assert array.nbytes == len(data)


@given(st.lists(arrays.arrays(np.int32, st.integers(0, 6)), max_size=6))
def test_ragged_sequences_come_back(sequences: list[np.ndarray]) -> None:
    back = from_ragged(to_ragged(sequences, np.int32), "x", dtypes="i")
    assert [list(sequence) for sequence in back] == [list(sequence) for sequence in sequences]


@pytest.mark.parametrize(
    "cu_seqlens", [[], [1, 4], [0, 3], [0, 3, 2, 4], [0, 5, 4], [0, -1, 4], [0, 2**63 - 1, -(2**63), 4], [0, 4, 5]]
)
def test_bad_boundaries_are_refused(cu_seqlens: list[int]) -> None:
    values = to_tensor(np.zeros(4, np.int32))
    message = tensor_pb2.RaggedTensor(values=values, cu_seqlens=to_tensor(np.array(cu_seqlens, np.int64)))
    with pytest.raises(RequestError, match=r"^x.cu_seqlens: must rise from 0 to the number of values, 4"):
        from_ragged(message, "x")


SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOB = Blob("file:///blobs/x", 24, "ab" * 32)


def hidden(**changes: object) -> HiddenStates:
    """[3, 2] float32, each byte 1."""
    fields: dict[str, object] = {"dtype": "float32", "shape": (3, 2), "content": b"\1" * 24}
    return HiddenStates(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("in_a_blob", [False, True])
def test_hidden_states_come_back(dtype: str, in_a_blob: bool) -> None:
    data = bytes(range(6 * SIZES[dtype]))
    states = hidden(dtype=dtype, content=Blob("file:///blobs/x", len(data), "ab" * 32) if in_a_blob else data)
    message = tensor_pb2.Tensor.FromString(to_hidden_states(states).SerializeToString())
    assert message.dtype == tensor_pb2.DType.Value(f"DTYPE_{dtype.upper()}")
    assert from_hidden_states(message, "x") == states


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (tensor_pb2.Tensor(), "required and none was sent"),
        (to_tensor(np.zeros((3, 2), np.int32)), "dtype DTYPE_INT32 is not accepted"),
        (to_tensor(np.zeros(6, np.float32)), r"2 dimensions expected, shape \[6\] received"),
        (to_hidden_states(hidden(content=b"\1" * 23)), r"shape \[3, 2\] of float32 takes 24 bytes, 23 received"),
        (to_hidden_states(hidden(dtype="float16")), r"of float16 takes 12 bytes, 24 received"),
        (to_hidden_states(hidden(shape=(4, 2), content=BLOB)), "takes 32 bytes, 24 received"),
        (to_hidden_states(hidden(content=Blob("file:///x", 24, "../x"))), "64 hexadecimal digits.*'../x' received"),
        (to_hidden_states(hidden(content=b"\1" * 20 + b"\0\0\xc0\x7f")), "not finite"),
    ],
)
def test_hidden_states_that_cannot_be_used_are_refused(message: tensor_pb2.Tensor, sentence: str) -> None:
    with pytest.raises(RequestError, match=f"^states: .*{sentence}"):
        from_hidden_states(message, "states")


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        # Largest and smallest numbers; infinities and NaN.
        ("float32", "ffff7f7f 01000000", ["0000807f", "000080ff", "0100807f", "ffffffff"]),
        ("bfloat16", "7f7f 7fff 0100", ["807f", "80ff", "817f", "ffff"]),
        ("float16", "ff7b fffb 0100", ["007c", "00fc", "017c", "ffff"]),
    ],
)
def test_what_is_not_finite_is_seen_in_every_dtype(dtype: str, good: str, bad: list[str]) -> None:
    numbers = bytes.fromhex(good)
    assert finite(HiddenStates(dtype, (1, len(numbers) // SIZES[dtype]), numbers))
    for number in bad:
        content = numbers + bytes.fromhex(number)
        assert not finite(HiddenStates(dtype, (1, len(content) // SIZES[dtype]), content))


def test_half_precision_agrees_with_numpy_on_what_is_finite() -> None:
    for bits in range(0, 2**16, 7):
        data = np.array([bits], "<u2").tobytes()
        assert finite(HiddenStates("float16", (1, 1), data)) == bool(np.isfinite(np.frombuffer(data, "<f2"))[0])
