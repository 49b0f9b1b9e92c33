"""Arrays and msgpack, there and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.clients import InvalidTensorError, ProtocolError
from pimoe.clients.tensors import decode, encode
from pimoe.clients.wire import pack, unpack

DTYPES = {np.float32: "FP32", np.float16: "FP16", np.float64: "FP64", ml_dtypes.bfloat16: "BF16"}


@pytest.mark.parametrize(("dtype", "datatype"), DTYPES.items())
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 4), (300, 64)])
def test_round_trip(dtype: Any, datatype: str, shape: tuple[int, int]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    body = b"".join(pack({"inputs": [encode(array, "x")]}))
    tensor = unpack(body, "test")["inputs"][0]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("x", datatype, list(shape))
    back = decode(tensor, array.dtype)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()
    assert back.shape == shape


def test_large_arrays_are_neither_copied_out_nor_in() -> None:
    array = np.ones((64, 64), np.float32)
    piece = next(piece for piece in pack(encode(array, "x")) if isinstance(piece, memoryview))
    assert np.shares_memory(np.frombuffer(piece, np.uint8), array)
    data = array.tobytes()
    back = decode({"datatype": "FP32", "shape": [64, 64], "data": data}, array.dtype)
    assert np.shares_memory(back, np.frombuffer(data, np.uint8))
    assert not back.flags.writeable


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4).T, np.arange(12.0)[::2].reshape(2, 3)])
def test_other_layouts_travel_in_c_order(array: Any) -> None:
    assert bytes(encode(array, "x")["data"]) == array.tobytes()


def test_big_endian_travels_as_little_endian() -> None:
    array = np.array([[1.0, 2.0]], ">f4")
    tensor = encode(array, "x")
    assert (tensor["datatype"], bytes(tensor["data"])) == ("FP32", array.astype("<f4").tobytes())


@pytest.mark.parametrize("array", [np.ones((1, 2), np.int64), np.ones((1, 2), bool), np.array([["a"]])])
def test_dtypes_that_cannot_travel_are_named(array: Any) -> None:
    with pytest.raises(InvalidTensorError, match=f"{array.dtype.name}.*bfloat16"):
        encode(array, "x")


@pytest.mark.parametrize(
    "change",
    [
        {"datatype": "FP8"},
        {"datatype": None},
        {"datatype": "BF16"},
        {"shape": [3, 2]},
        {"shape": [-1, -4]},
        {"shape": ["2", 2]},
        {"shape": 4},
        {"shape": [0, 2**70], "data": b""},
        {"shape": [1] * 99 + [4]},
        {"data": "text"},
        {"data": None},
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change: dict[str, Any]) -> None:
    tensor = {"name": "output", "datatype": "FP32", "shape": [2, 2], "data": bytes(16), **change}
    with pytest.raises(ProtocolError):
        decode(tensor, np.dtype(np.float32))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text()
    | st.binary()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES))
@settings(max_examples=30)
def test_pack_is_msgpack(value: dict[str, Any]) -> None:
    assert unpack(b"".join(pack(value)), "test") == value


@given(st.lists(st.integers(0, 20_000), max_size=4))
def test_views_become_bin_wherever_they_are(sizes: list[int]) -> None:
    views = [memoryview(bytes([n % 256]) * size) for n, size in enumerate(sizes)]
    body = b"".join(pack({"a": [{"data": view, "after": 1} for view in views]}))
    assert unpack(body, "test") == {"a": [{"data": bytes(view), "after": 1} for view in views]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x82\xa1a",
        b"\x80\x80",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\x81\x01\x01",
        msgpack.packb([1]),
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        b"<html>",
    ],
)
def test_what_is_no_proper_map_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="POST /x"):
        unpack(body, "POST /x")
