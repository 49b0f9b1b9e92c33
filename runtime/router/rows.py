"""A batch's rows: one gather out of the requests' bytes into one buffer, and slices of one output out of it.

No request has a tensor of its own: making, checking and converting one takes longer than its share of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..requests import DTYPE_BYTES, TensorData
from ..tensors import from_wire, to_wire, torch_dtype

_MAX_FREE = 4  # buffers that are kept; more batches than that are seldom in flight at once


class RowBuffers:
    """Memory for batches, used again: the system zeroes new memory of this size page by page, each time.

    Args:
        row_bytes: of one row in the model's dtype.
    """

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._free: list[Tensor] = []

    def take(self, rows: int) -> Tensor:
        """At least so many rows, as bytes."""
        size = rows * self._row_bytes
        for index, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                return self._free.pop(index)
        # A quarter more: of batches that grow slowly not each needs another one.
        return torch.empty(size + size // 4, dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """Nothing reads it any more."""
        self._free.append(buffer)
        self._free.sort(key=Tensor.numel)
        del self._free[:-_MAX_FREE]


def gather(states: Sequence[TensorData], dtype: str, buffer: Tensor) -> Tensor:
    """All rows in order, `[rows, hidden]` in `dtype`, in the buffer's memory; those of one request in their own.

    Args:
        states: `[tokens, hidden]`, of any floating dtype.
        buffer: bytes, at least as many as the rows take.
    """
    if len(states) == 1 and states[0].dtype == dtype:
        return from_wire(states[0])
    hidden_size, itemsize = states[0].shape[1], DTYPE_BYTES[dtype]
    rows = sum(each.shape[0] for each in states)
    taken = buffer[: rows * hidden_size * itemsize]
    hidden = taken.view(torch_dtype(dtype)).view(rows, hidden_size)
    plain = taken.numpy().data
    start = 0
    for each in states:
        end = start + each.shape[0] * hidden_size * itemsize
        if each.dtype == dtype:
            plain[start:end] = each.flat()
        else:
            first = start // (hidden_size * itemsize)
            hidden[first : first + each.shape[0]] = from_wire(each)
        start = end
    return hidden


def are_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity among them."""
    # A sum of finite numbers may overflow, but one with NaN or infinity in it never is a finite number.
    wide = torch.float64 if values.dtype is torch.float64 else torch.float32
    return math.isfinite(values.sum(dtype=wide).item()) or bool(torch.isfinite(values).all())


class Outputs:
    """What a batch gave, in whatever dtypes its requests have.

    Args:
        output: `[rows, hidden]`.
    """

    def __init__(self, output: Tensor) -> None:
        self._output = output
        self._converted: dict[str, tuple[TensorData, bool]] = {}

    def slice(self, start: int, end: int, dtype: str) -> TensorData | None:
        """Some of the rows, over the memory of all; None where not all of their numbers fit the dtype."""
        if dtype not in self._converted:
            converted = self._output.to(torch_dtype(dtype))
            self._converted[dtype] = to_wire(converted), are_finite(converted)
        whole, finite = self._converted[dtype]
        hidden_size = whole.shape[1]
        row_bytes = hidden_size * DTYPE_BYTES[dtype]
        rows = TensorData(dtype, (end - start, hidden_size), whole.data[start * row_bytes : end * row_bytes])
        return rows if finite or are_finite(from_wire(rows)) else None


def split_rows(states: TensorData, most: int) -> list[TensorData]:
    """Pieces of at most `most` rows, over the same memory."""
    rows, hidden_size = states.shape
    row_bytes = hidden_size * DTYPE_BYTES[states.dtype]
    data = memoryview(states.flat())
    return [
        TensorData(states.dtype, (end - start, hidden_size), data[start * row_bytes : end * row_bytes])
        for start, end in ((start, min(start + most, rows)) for start in range(0, rows, most))
    ]


def join_rows(pieces: Sequence[TensorData]) -> TensorData:
    """The pieces as one again."""
    if len(pieces) == 1:
        return pieces[0]
    shape = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
    return TensorData(pieces[0].dtype, shape, b"".join(piece.data for piece in pieces))
