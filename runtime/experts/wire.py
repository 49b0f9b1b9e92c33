"""How a dispatch to an expert group and its answer are packed; both ends read it, and nothing between them.

request's meta   version, code of hidden's dtype, layer, rows, hidden size, pairs
request's body   offsets `[rows + 1]`, experts `[pairs]`, weights `[pairs]`, zeros to a multiple of 64 bytes,
                 hidden `[rows, hidden]`
answer's meta    version, seconds of computing
answer's body    sums `[rows, hidden]` float32
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidTensorError, LinkProtocolError
from ..links import Packed
from ..links.messages import Buffer
from ..routing.plan import ExpertRows

_VERSION = 1
_REQUEST = struct.Struct("<BBIIII")
_ANSWER = struct.Struct("<Bd")
_ALIGNMENT = 64
_ZEROS = bytes(_ALIGNMENT)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_NUMPY: dict[int, type[np.generic]] = {2: np.int16, 4: np.int32, 8: np.int64}  # numpy has no bfloat16
_NUMBER_BYTES = 4  # of an offset, an expert's id and a weight


def pack_rows(layer: int, rows: ExpertRows) -> Packed:
    """A dispatch. It looks at the memory of `rows` until it is sent, where that is on the CPU.

    Raises:
        InvalidTensorError: hidden states of a dtype that experts do not compute in.
    """
    hidden = rows.hidden
    if hidden.dtype not in _CODES:
        raise InvalidTensorError(f"hidden states are {hidden.dtype}; they must be one of {_DTYPES}")
    meta = _REQUEST.pack(_VERSION, _CODES[hidden.dtype], layer, *hidden.shape, len(rows.experts))
    numbers = b"".join((rows.offsets.data, rows.experts.data, rows.weights.data))
    padding = -len(numbers) % _ALIGNMENT
    return Packed(meta, (numbers + _ZEROS[:padding], _bytes_of(hidden)))


def unpack_rows(packed: Packed, device: torch.device) -> tuple[int, ExpertRows]:
    """The layer and the rows that `pack_rows` packed, over the same memory where `device` is the CPU. What the
    numbers say is not checked.

    Raises:
        InvalidTensorError: another version of the layout, or lengths that do not go together.
    """
    try:
        version, code, layer, count, hidden_size, pairs = _REQUEST.unpack(packed.meta)
    except struct.error as error:
        raise InvalidTensorError(f"a dispatch describes itself in {_REQUEST.size} bytes: {error}") from error
    if version != _VERSION or code >= len(_DTYPES):
        raise InvalidTensorError(f"a dispatch of version {version}, dtype {code} is unknown here")
    dtype = _DTYPES[code]
    numbers_bytes = _NUMBER_BYTES * (count + 1 + 2 * pairs)
    start = numbers_bytes + -numbers_bytes % _ALIGNMENT
    body = _whole(packed)
    if len(body) != start + count * hidden_size * dtype.itemsize or not count * hidden_size:
        raise InvalidTensorError(f"{count} rows of {hidden_size} and {pairs} pairs are not {len(body)} bytes")
    offsets, experts = (
        np.frombuffer(body, np.int32, count + 1),
        np.frombuffer(body, np.int32, pairs, 4 * (count + 1)),
    )
    weights = np.frombuffer(body, np.float32, pairs, 4 * (count + 1 + pairs))
    hidden = _over(body, start, count, hidden_size, dtype)
    return layer, ExpertRows(hidden if device.type == "cpu" else hidden.to(device), offsets, experts, weights)


def pack_sums(sums: Tensor, computed_s: float) -> Packed:
    """An answer: `[rows, hidden]` float32, and how long it took to compute."""
    return Packed(_ANSWER.pack(_VERSION, computed_s), (_bytes_of(sums),))


def unpack_sums(packed: Packed, asked: Tensor) -> tuple[Tensor, float]:
    """The sums and the seconds that `pack_sums` packed, where `asked` are the rows that were sent.

    Raises:
        LinkProtocolError: they are no answer to those.
    """
    body = _whole(packed)
    if len(packed.meta) != _ANSWER.size or len(body) != 4 * asked.numel():
        raise LinkProtocolError("a group answered with other tensors than were asked for")
    version, computed_s = _ANSWER.unpack(packed.meta)
    if version != _VERSION:
        raise LinkProtocolError(f"a group answered in version {version} of the layout")
    sums = _over(body, 0, asked.shape[0], asked.shape[1], torch.float32)
    return sums if asked.is_cpu else sums.to(asked.device), computed_s


def _whole(packed: Packed) -> Buffer:
    (body,) = packed.body
    return body


def _over(body: Buffer, start: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix over the memory of `body`; by way of numpy, which takes half as long as `torch.frombuffer`."""
    numbers = _NUMPY[dtype.itemsize] if dtype is not torch.float32 else np.float32
    tensor = torch.from_numpy(np.ndarray((rows, columns), numbers, body, start))
    return tensor if dtype is torch.float32 else tensor.view(dtype)


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.is_cpu or tensor.requires_grad or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint8).numpy().data.cast("B")
