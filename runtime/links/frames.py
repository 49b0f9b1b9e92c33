"""The link's frame format, without I/O.

    offset  bytes  field
    0       4      magic "PMOE"
    4       1      version
    5       1      kind; plus 128: the body lies in shared memory
    6       2      padding bytes at the header's end
    8       4      stream id
    12      4      header length, the padding after the header included
    16      8      body length
    24             header: a msgpack map, then zero padding that aligns the body to 64 bytes
    ...            body: the raw tensor buffers, each padded to a multiple of 64; or its slot (4 bytes) and place
                   (8 bytes) in memory that both ends map, see `shared_memory.py`

The header's key "t" lists the body's tensors as `[dtype, shape]`; their lengths follow from those. Received
bodies get memory of their own, or are in shared memory: tensors are views of it and are never copied. Lengths are
checked before anything is allocated; msgpack extension types are refused, and nothing is ever unpickled.

A packed frame's header and body are bytes that only its method reads; a packed request's header begins with the
seconds that remain (a double), the length of the method's name (a byte), and that name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgpack
import numpy as np

from ..errors import LinkProtocolError
from ..requests import DTYPE_BYTES, TensorData
from .messages import Buffer, Packed
from .shared_memory import Inbox

MAGIC = b"PMOE"
VERSION = 2
PREFIX = struct.Struct("<4sBBHIIQ")
ALIGNMENT = 64  # a cache line: what vectorised kernels like their inputs aligned to
_RECEIVE_BYTES = 64 * 1024
_MAX_DIMENSIONS = 32  # the product of an endless shape would keep the loop busy
_ZEROS = [bytes(length) for length in range(ALIGNMENT)]
_CALL = struct.Struct("<dB")
_SHARED = 128  # added to a frame's kind
_KIND_AT = 5
_PLACE = struct.Struct("<IQ")


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 1  # server's challenge
    PROOF = 2  # client's answer and its own challenge
    WELCOME = 3  # server's answer; the link is open
    REQUEST = 4
    ITEM = 5  # one item of a streamed answer
    RESPONSE = 6  # the answer, or the end of a streamed one
    ERROR = 7
    CANCEL = 8
    CREDIT = 9  # how many calls the server lets the client keep in flight
    PING = 10
    PONG = 11
    GOAWAY = 12  # the server drains: no new calls
    PACKED_REQUEST = 13
    PACKED_RESPONSE = 14


_KINDS = {kind.value: kind for kind in Kind}  # looking up costs a quarter of what the class does
_PACKED = (Kind.PACKED_REQUEST, Kind.PACKED_RESPONSE)


@dataclass(slots=True)
class Frame:
    """One frame; `tensors` are views of the frame's own memory. A packed frame has `packed` instead of both."""

    kind: Kind
    stream: int
    header: dict[str, Any]
    tensors: list[TensorData]
    packed: Packed | None = None


def _padding(length: int) -> int:
    return -length % ALIGNMENT


def encode_frame(
    kind: Kind, stream: int, header: dict[str, Any] | None = None, tensors: Sequence[TensorData] = ()
) -> list[Buffer]:
    """The frame as buffers to be written one after the other; tensor bytes are not copied.

    Raises:
        LinkProtocolError: a tensor's dtype may not travel, or its byte length is not that of its dtype and shape.
    """
    fields = dict(header) if header else {}
    body: list[Buffer] = []
    body_bytes = 0
    if tensors:
        fields["t"] = [(tensor.dtype, tensor.shape) for tensor in tensors]
        for tensor in tensors:
            if tensor.dtype not in DTYPE_BYTES:
                raise LinkProtocolError(f"tensor dtype {tensor.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
            size = _tensor_bytes(tensor.dtype, tensor.shape)
            if size != tensor.nbytes:
                raise LinkProtocolError(f"tensor {tensor.dtype}{tensor.shape} needs {size} B, has {tensor.nbytes}")
            if not size:
                continue
            body.append(_flat(tensor.data))
            if padding := _padding(size):
                body.append(_ZEROS[padding])
            body_bytes += size + padding
    packed = msgpack.packb(fields) if fields else b""
    padding = _padding(PREFIX.size + len(packed)) if body else 0
    prefix = PREFIX.pack(MAGIC, VERSION, kind, padding, stream, len(packed) + padding, body_bytes)
    return [prefix + packed + _ZEROS[padding], *body]


def encode_packed(kind: Kind, stream: int, packed: Packed) -> list[Buffer]:
    """The frame as buffers to be written one after the other; the body's bytes are not copied."""
    meta, body = packed
    body_bytes = sum(map(len, body))
    padding = _padding(PREFIX.size + len(meta)) if body_bytes else 0
    prefix = PREFIX.pack(MAGIC, VERSION, kind, padding, stream, len(meta) + padding, body_bytes)
    return [prefix + meta + _ZEROS[padding], *body]


def with_shared_body(head: Buffer, slot: int, place: int) -> Buffer:
    """A frame, of which `head` is the first buffer, whose body is in shared memory."""
    frame = bytearray(head)
    frame[_KIND_AT] += _SHARED
    return frame + _PLACE.pack(slot, place)


def pack_call(remaining_s: float, method: bytes, meta: bytes) -> bytes:
    """The meta of a packed request."""
    return _CALL.pack(remaining_s, len(method)) + method + meta


def unpack_call(meta: bytes) -> tuple[float, str, bytes]:
    """Remaining seconds, method and the method's own meta.

    Raises:
        LinkProtocolError: the bytes are too few, or the method's name is no text.
    """
    try:
        remaining_s, length = _CALL.unpack_from(meta)
        start = _CALL.size + length
        if start > len(meta):
            raise LinkProtocolError("a packed call ends within its method's name")
        return remaining_s, meta[_CALL.size : start].decode("ascii"), meta[start:]
    except (struct.error, UnicodeDecodeError) as error:
        raise LinkProtocolError(f"bad packed call: {error}") from error


def _flat(data: Buffer) -> Buffer:
    """The same memory as plain bytes: transports take a buffer's `len` for its size in bytes."""
    if isinstance(data, memoryview) and (data.ndim != 1 or data.itemsize != 1):
        return data.cast("B")
    return data


def _tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    return DTYPE_BYTES[dtype] * math.prod(shape)


def _unpack(data: memoryview) -> dict[str, Any]:
    if not len(data):
        return {}
    try:
        # timestamp=1: the one extension that msgpack never asks the hook about comes as a plain number.
        header = msgpack.unpackb(data, ext_hook=_refuse_extension, strict_map_key=True, timestamp=1)
    except LinkProtocolError:
        raise
    except Exception as error:  # msgpack raises a dozen types; all of them mean the same to us
        raise LinkProtocolError(f"frame header is not msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise LinkProtocolError(f"frame header is {type(header).__name__}, not a map")
    return header


def _refuse_extension(code: int, data: bytes) -> None:
    raise LinkProtocolError(f"msgpack extension type {code} refused")


def _slice_tensors(header: dict[str, Any], body: memoryview) -> list[TensorData]:
    tensors: list[TensorData] = []
    described = header.get("t", ())
    offset = 0
    try:
        for dtype, shape in described:
            if len(shape) > _MAX_DIMENSIONS or any(n < 0 for n in shape):
                raise LinkProtocolError(f"tensor {dtype!r:.40} has an impossible shape")
            size = _tensor_bytes(dtype, shape)
            if offset + size > len(body):
                raise LinkProtocolError(f"tensor {dtype}{shape} does not fit the frame's body")
            tensors.append(TensorData(dtype, tuple(shape), body[offset : offset + size]))
            offset += size + _padding(size)
    except (TypeError, ValueError, KeyError) as error:
        raise LinkProtocolError(f"bad tensor description {described!r:.200}") from error
    return tensors


def _frame(kind: Kind, stream: int, header: dict[str, Any] | bytes, body: memoryview) -> Frame:
    if isinstance(header, bytes):
        return Frame(kind, stream, {}, [], Packed(header, (body,)))
    return Frame(kind, stream, header, _slice_tensors(header, body))


class FrameReader:
    """Turns received bytes into frames. The protocol asks `get_buffer` where the next bytes go.

    Small frames are parsed out of one reused receive buffer; a body that has not arrived whole gets memory of
    its own, and the rest of it is received straight into that.

    Args:
        max_header_bytes, max_body_bytes: longer frames raise before anything is allocated. Both may be raised
            later (a link starts with small limits until its peer is authenticated).

    Attributes:
        inbox: where bodies in shared memory are; None: there are none.
    """

    def __init__(self, max_header_bytes: int, max_body_bytes: int) -> None:
        self.max_header_bytes = max_header_bytes
        self.max_body_bytes = max_body_bytes
        self.inbox: Inbox | None = None
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._body: memoryview | None = None
        self._body_filled = 0
        self._pending: tuple[Kind, int, dict[str, Any] | bytes] | None = None

    def get_buffer(self) -> memoryview:
        """Where the next received bytes belong; never empty."""
        if self._body is not None:
            return self._body[self._body_filled :]
        return self._view[self._filled :]

    def buffer_updated(self, count: int) -> list[Frame]:
        """`count` bytes were received into the last `get_buffer`; the frames that are now whole.

        Raises:
            LinkProtocolError: the bytes are no frame, or one over the limits. The reader is then unusable.
        """
        if self._body is not None:
            self._body_filled += count
            return [self._finish_body()] if self._body_filled == len(self._body) else []
        self._filled += count
        frames: list[Frame] = []
        start = 0
        while (end := self._parse_one(start, frames)) is not None:
            start = end
        self._compact(start)
        return frames

    def _parse_one(self, start: int, frames: list[Frame]) -> int | None:
        """Parse the frame at `start`; the offset after what was consumed, or None when more bytes are needed."""
        available = self._filled - start
        if self._body is not None or available < PREFIX.size:
            return None
        kind, stream, padding, header_bytes, body_bytes, shared = self._read_prefix(start)
        head = PREFIX.size + header_bytes
        needed = head + _PLACE.size if shared else head
        if available < needed:
            self._ensure_room(start, needed)
            return None
        plain = self._view[start + PREFIX.size : start + head - padding]
        header = plain.tobytes() if kind in _PACKED else _unpack(plain)
        if not body_bytes:
            frames.append(_frame(kind, stream, header, memoryview(b"")))
            return start + needed
        if shared:
            frames.append(_frame(kind, stream, header, self._shared_body(start + head, body_bytes)))
            return start + needed
        body = np.empty(body_bytes, np.uint8).data  # np.empty: memory that is not zeroed first
        present = min(available - head, body_bytes)
        body[:present] = self._view[start + head : start + head + present]
        self._pending, self._body, self._body_filled = (kind, stream, header), body, present
        if present == body_bytes:
            frames.append(self._finish_body())
        return start + head + present

    def _read_prefix(self, start: int) -> tuple[Kind, int, int, int, int, bool]:
        magic, version, kind, padding, stream, header_bytes, body_bytes = PREFIX.unpack_from(self._view, start)
        if magic != MAGIC or version != VERSION or padding > header_bytes:
            raise LinkProtocolError("peer does not speak this version of the pimoe link protocol")
        if header_bytes > self.max_header_bytes or body_bytes > self.max_body_bytes:
            raise LinkProtocolError(f"frame of {header_bytes} + {body_bytes} bytes is over the link's limits")
        plain_kind = kind & ~_SHARED
        if plain_kind not in _KINDS:
            raise LinkProtocolError(f"unknown frame kind {kind}")
        return _KINDS[plain_kind], stream, padding, header_bytes, body_bytes, kind != plain_kind

    def _shared_body(self, at: int, size: int) -> memoryview:
        if self.inbox is None:
            raise LinkProtocolError("a frame's body is in shared memory, and there is none")
        slot, place = _PLACE.unpack_from(self._view, at)
        return self.inbox.body(slot, place, size)

    def _finish_body(self) -> Frame:
        assert self._pending is not None
        assert self._body is not None
        kind, stream, header = self._pending
        frame = _frame(kind, stream, header, self._body)
        self._pending, self._body, self._body_filled = None, None, 0
        return frame

    def _ensure_room(self, start: int, needed: int) -> None:
        """Grow the receive buffer for a header that is longer than it (bounded by `max_header_bytes`)."""
        if needed > len(self._buffer):
            grown = bytearray(needed + _RECEIVE_BYTES)
            grown[: self._filled] = self._view[: self._filled]
            self._buffer, self._view = grown, memoryview(grown)

    def _compact(self, start: int) -> None:
        if start == 0:
            return
        left = self._filled - start
        self._view[:left] = self._view[start : self._filled]
        self._filled = left
        if not left and len(self._buffer) > _RECEIVE_BYTES:  # one long header must not hold its memory for ever
            self._buffer = bytearray(_RECEIVE_BYTES)
            self._view = memoryview(self._buffer)
