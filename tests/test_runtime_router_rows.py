"""Rows of many requests in one buffer, and cut out of one output again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pimoe.runtime.requests import DTYPE_BYTES, TensorData
from pimoe.runtime.router.rows import Outputs, RowBuffers, are_finite, gather, join_rows, split_rows
from pimoe.runtime.tensors import from_wire, to_wire, torch_dtype
from torch import Tensor

HIDDEN = 6
FLOATING = ["float64", "float32", "float16", "bfloat16"]


def rows(count: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator).to(torch_dtype(dtype))


def buffer(count: int, dtype: str) -> Tensor:
    return RowBuffers(HIDDEN * DTYPE_BYTES[dtype]).take(count)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("sizes", [[1], [3, 1, 4], [2] * 30])
def test_gathered_in_order_and_cut_again(dtype: str, sizes: list[int]) -> None:
    pieces = [rows(size, dtype, seed) for seed, size in enumerate(sizes)]
    hidden = gather([to_wire(piece) for piece in pieces], dtype, buffer(sum(sizes), dtype))
    assert torch.equal(hidden, torch.cat(pieces))
    outputs, start = Outputs(hidden.float()), 0
    for piece in pieces:
        cut = outputs.slice(start, start + len(piece), dtype)
        assert cut is not None
        assert (cut.dtype, cut.shape) == (dtype, tuple(piece.shape))
        assert torch.equal(from_wire(cut), piece.float().to(piece.dtype))
        start += len(piece)


def test_requests_of_several_dtypes_share_a_batch() -> None:
    pieces = [rows(2, dtype, seed) for seed, dtype in enumerate(FLOATING)]
    hidden = gather([to_wire(piece) for piece in pieces], "float32", buffer(8, "float32"))
    assert torch.equal(hidden, torch.cat([piece.float() for piece in pieces]))


def test_bytes_may_be_read_only_and_anywhere() -> None:
    states = to_wire(rows(2))
    shifted = memoryview(b"x" + bytes(states.data))[1:]
    hidden = gather([states, TensorData("float32", (2, HIDDEN), shifted)], "float32", buffer(4, "float32"))
    assert torch.equal(hidden[:2], hidden[2:])


def test_bytes_may_be_of_any_shape() -> None:
    """`memoryview` of an array knows its shape and its numbers."""
    arrays = [np.full((rows, 4), rows, np.float32) for rows in (1, 2)]
    odd = [TensorData("float32", array.shape, array.data) for array in arrays]
    gathered = gather(odd, "float32", torch.empty(100, dtype=torch.uint8))
    assert gathered.tolist() == [[1.0] * 4] + [[2.0] * 4] * 2
    pieces = split_rows(TensorData("float32", (3, 4), np.arange(12, dtype=np.float32).reshape(3, 4).data), 2)
    assert [piece.nbytes for piece in pieces] == [32, 16]


def test_memory_is_used_again_but_never_by_two_at_once() -> None:
    buffers = RowBuffers(HIDDEN * 4)
    first, second = buffers.take(10), buffers.take(10)
    assert first.data_ptr() != second.data_ptr()
    buffers.give_back(first)
    again = buffers.take(11)
    assert again.data_ptr() == first.data_ptr()
    assert again.numel() >= 11 * HIDDEN * 4


def test_few_buffers_are_kept_and_the_largest() -> None:
    buffers = RowBuffers(1)
    taken = [buffers.take(size) for size in (8, 800, 80, 8000, 800, 80_000)]
    for each in taken:
        buffers.give_back(each)
    kept = sorted(buffers.take(1).numel() for _ in range(4))
    assert kept[-1] >= 80_000
    assert kept[0] >= 800


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(dtype: str, bad: float) -> None:
    values = rows(4, dtype)
    assert are_finite(values)
    values[2, 3] = bad
    assert not are_finite(values)
    values[0, 0] = -bad
    assert not are_finite(values)


@pytest.mark.parametrize("dtype", FLOATING)
def test_sums_that_overflow_are_no_infinities(dtype: str) -> None:
    assert are_finite(torch.full((40, HIDDEN), torch.finfo(torch_dtype(dtype)).max, dtype=torch_dtype(dtype)))


def test_only_the_rows_that_overflow_are_refused() -> None:
    output = torch.ones(3, HIDDEN)
    output[1] = 1e6
    outputs = Outputs(output)
    assert [outputs.slice(row, row + 1, "float16") is None for row in range(3)] == [False, True, False]
    assert outputs.slice(0, 3, "float32") is not None


def test_split_and_joined() -> None:
    states = to_wire(rows(10))
    pieces = split_rows(states, 4)
    assert [piece.shape for piece in pieces] == [(4, HIDDEN), (4, HIDDEN), (2, HIDDEN)]
    joined = join_rows(pieces)
    assert (joined.dtype, joined.shape, bytes(joined.data)) == ("float32", (10, HIDDEN), bytes(states.data))
    assert join_rows(split_rows(states, 10)).shape == (10, HIDDEN)
