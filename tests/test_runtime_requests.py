"""The neutral request types, over the wire and back."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from pimoe.runtime.requests import (
    DTYPE_BYTES,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    TensorData,
    TokenChunk,
    TokenLogprob,
)

SAMPLING = SamplingParams(
    max_tokens=7,
    min_tokens=2,
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    seed=2**40,
    logprobs=3,
    stop_token_ids=(1, 2),
    ignore_eos=True,
)


def over_the_wire(value: dict[str, Any]) -> dict[str, Any]:
    received = msgpack.unpackb(msgpack.packb(value))
    assert isinstance(received, dict)
    return received


def test_a_generate_request_comes_back_equal_with_the_remaining_time() -> None:
    request = GenerateRequest("id", (5, 6, 7), SAMPLING, priority=0.75, timeout_s=60.0, emitted=(8, 9))
    copy = GenerateRequest.from_wire(over_the_wire(request.to_wire()), 12.5)
    assert copy == GenerateRequest("id", (5, 6, 7), SAMPLING, priority=0.75, timeout_s=12.5, emitted=(8, 9))
    assert isinstance(copy.sampling.stop_token_ids, tuple)


@pytest.mark.parametrize(
    "chunk",
    [
        TokenChunk((1, 2)),
        TokenChunk((), "stop"),
        TokenChunk((3,), "length", ()),
        TokenChunk((3,), None, (TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.25))),)),
    ],
)
def test_a_token_chunk_comes_back_equal(chunk: TokenChunk) -> None:
    assert TokenChunk.from_wire(over_the_wire(chunk.to_wire())) == chunk


def test_model_info_comes_back_equal() -> None:
    info = ModelInfo("m", "decoder", "olmoe", "float32", 8, 4, 2, (0, 1), 256, 512, (1, 2), "digest")
    assert ModelInfo.from_wire(over_the_wire(info.to_wire())) == info


def test_tensor_bytes_are_counted_in_bytes_whatever_the_buffer() -> None:
    array = np.zeros((3, 4), np.float32)
    for data in (array.tobytes(), bytearray(48), array.data, array.reshape(-1).view(np.uint8).data):
        assert TensorData("float32", (3, 4), data).nbytes == 48


def test_dtype_sizes_are_right() -> None:
    for name, size in DTYPE_BYTES.items():
        assert size == (2 if name == "bfloat16" else np.dtype(name).itemsize)
