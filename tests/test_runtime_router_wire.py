"""Tensor requests and answers as links carry them between gateways and routers."""

from __future__ import annotations

import numpy as np
import pytest
from pimoe.runtime.errors import InvalidTensorError, LinkProtocolError
from pimoe.runtime.links import Packed
from pimoe.runtime.requests import DTYPE_BYTES, InferRequest, InferResult, TensorData
from pimoe.runtime.router.wire import pack_request, pack_result, unpack_request, unpack_result

FLOATING = ["float64", "float32", "float16", "bfloat16"]


def tensor(dtype: str = "float32", tokens: int = 3, hidden_size: int = 4) -> TensorData:
    size = tokens * hidden_size * DTYPE_BYTES[dtype]
    return TensorData(dtype, (tokens, hidden_size), bytes(range(size)))


def received(packed: Packed) -> Packed:
    """As it comes out of a link: one buffer."""
    return Packed(packed.meta, (memoryview(bytearray(b"".join(packed.body))),))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layer", [None, 0, 61])
def test_requests_come_back_equal(dtype: str, layer: int | None) -> None:
    request = InferRequest("id", tensor(dtype), layer, 0.125, 60.0, "tenant")
    assert unpack_request(received(pack_request(request)), 2.5) == InferRequest(
        "", tensor(dtype), layer, 0.125, 2.5, ""
    )


@pytest.mark.parametrize("dtype", FLOATING)
def test_answers_come_back_equal(dtype: str) -> None:
    assert unpack_result(received(pack_result(InferResult(tensor(dtype))))) == InferResult(tensor(dtype))


def test_memory_of_any_form_is_sent_flat_and_not_copied() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    (body,) = pack_request(InferRequest("r", TensorData("float32", (3, 4), array.data))).body
    assert isinstance(body, memoryview)
    assert (body.ndim, len(body)) == (1, 48)
    array[0, 0] = 7.0
    assert bytes(body) == array.tobytes()


@pytest.mark.parametrize(
    "states", [TensorData("int64", (1, 4), bytes(32)), TensorData("float32", (4,), bytes(16))]
)
def test_what_is_no_request_is_not_sent(states: TensorData) -> None:
    with pytest.raises(InvalidTensorError):
        pack_request(InferRequest("r", states))


@pytest.mark.parametrize("changed", [lambda meta: meta + b"x", lambda meta: b"", lambda meta: b"\x09" + meta[1:]])
def test_other_layouts_are_refused(changed: object) -> None:
    assert callable(changed)
    request, result = pack_request(InferRequest("r", tensor())), pack_result(InferResult(tensor()))
    with pytest.raises(LinkProtocolError):
        unpack_request(Packed(changed(request.meta), request.body), 1.0)
    with pytest.raises(LinkProtocolError):
        unpack_result(Packed(changed(result.meta), result.body))


def test_an_unknown_dtype_is_refused() -> None:
    packed = pack_result(InferResult(tensor()))
    with pytest.raises(LinkProtocolError, match="dtype 9"):
        unpack_result(Packed(packed.meta[:1] + b"\x09" + packed.meta[2:], packed.body))


def test_an_answer_of_another_length_is_refused() -> None:
    packed = pack_result(InferResult(tensor()))
    with pytest.raises(LinkProtocolError, match="has 47 bytes"):
        unpack_result(Packed(packed.meta, (bytes(47),)))
