"""Frames: what is encoded comes out again however it is cut, and no bytes from outside can do harm."""

from __future__ import annotations

import contextlib
import math
import struct
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.errors import LinkProtocolError
from pimoe.runtime.links.frames import ALIGNMENT, MAGIC, PREFIX, VERSION, Frame, FrameReader, Kind, encode_frame
from pimoe.runtime.requests import DTYPE_BYTES, TensorData

LARGE = 2**20
RECEIVE_BYTES = len(FrameReader(LARGE, LARGE).get_buffer())


def encoded(
    kind: Kind = Kind.REQUEST, stream: int = 1, header: dict[str, Any] | None = None, *tensors: TensorData
) -> bytes:
    return b"".join(encode_frame(kind, stream, header, tensors))


def feed(reader: FrameReader, data: bytes, sizes: Sequence[int] = ()) -> list[Frame]:
    """Hand over `data` as a transport does: at most `sizes[i]` bytes at once, in turn, and no more than fit."""
    frames: list[Frame] = []
    position = turn = 0
    while position < len(data):
        room = reader.get_buffer()
        assert len(room) > 0
        count = min(len(room), len(data) - position)
        if sizes:
            count = min(count, sizes[turn % len(sizes)])
            turn += 1
        room[:count] = data[position : position + count]
        position += count
        frames += reader.buffer_updated(count)
    return frames


def read(data: bytes, max_header: int = LARGE, max_body: int = LARGE, sizes: Sequence[int] = ()) -> list[Frame]:
    return feed(FrameReader(max_header, max_body), data, sizes)


def plain(tensors: Sequence[TensorData]) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(tensor.dtype, tensor.shape, bytes(tensor.data)) for tensor in tensors]


def prefix(
    magic: bytes = MAGIC, version: int = VERSION, kind: int = 4, padding: int = 0, header: int = 0, body: int = 0
) -> bytes:
    return PREFIX.pack(magic, version, kind, padding, 1, header, body)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
headers = st.dictionaries(st.text(max_size=5).filter(lambda key: key != "t"), values, max_size=4)


@st.composite
def tensor_data(draw: st.DrawFn) -> TensorData:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    size = DTYPE_BYTES[dtype] * math.prod(shape)
    return TensorData(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


frame_values = st.tuples(
    st.sampled_from([kind for kind in Kind if not kind.name.startswith("PACKED")]),
    st.integers(0, 2**32 - 1),
    headers,
    st.lists(tensor_data(), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(frame_values, min_size=1, max_size=4), st.lists(st.integers(1, 90), max_size=5))
def test_frames_cut_anywhere_come_out_equal(
    sent: list[tuple[Kind, int, dict[str, Any], list[TensorData]]], sizes: list[int]
) -> None:
    data = b"".join(encoded(kind, stream, header, *tensors) for kind, stream, header, tensors in sent)
    received = read(data, sizes=sizes)
    assert [(frame.kind, frame.stream) for frame in received] == [(kind, stream) for kind, stream, _, _ in sent]
    for frame, (_, _, header, tensors) in zip(received, sent, strict=True):
        frame.header.pop("t", None)
        assert repr(frame.header) == repr(header)  # by repr: NaN is not equal to itself
        assert plain(frame.tensors) == plain(tensors)


def test_a_frame_cut_at_every_byte_comes_out_equal() -> None:
    data = encoded(Kind.ITEM, 7, {"h": 1}, TensorData("int32", (3,), bytes(range(12)))) + encoded(Kind.PING)
    for cut in range(1, len(data)):
        reader = FrameReader(LARGE, LARGE)
        frames = feed(reader, data[:cut]) + feed(reader, data[cut:])
        assert [frame.kind for frame in frames] == [Kind.ITEM, Kind.PING]
        assert bytes(frames[0].tensors[0].data) == bytes(range(12))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=3))
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes, sizes: list[int]) -> None:
    try:
        read(data, sizes=sizes)
    except LinkProtocolError:
        return
    assert len(data) < PREFIX.size


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(0, 70),
    st.integers(0, 400),
    st.integers(0, 400),
    st.binary(max_size=64) | values.map(msgpack.packb) | headers.map(msgpack.packb),
)
def test_well_begun_frames_raise_nothing_but_protocol_errors(
    kind: int, padding: int, header_bytes: int, body_bytes: int, rest: bytes
) -> None:
    for length in (header_bytes, len(rest)):
        data = prefix(kind=kind, padding=padding, header=length, body=body_bytes) + rest + bytes(800)
        with contextlib.suppress(LinkProtocolError):
            read(data, max_header=512, max_body=512)


shapes = st.lists(st.integers(-3, 2**64 - 1) | st.floats() | st.text(max_size=1) | st.booleans(), max_size=3)
descriptions = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)) | scalars, shapes | values), max_size=3)


@settings(max_examples=200, deadline=None)
@given(descriptions | values, st.integers(0, 3))
def test_odd_tensor_descriptions_raise_nothing_but_protocol_errors(described: Any, blocks: int) -> None:
    header = msgpack.packb({"t": described})
    data = prefix(header=len(header), body=64 * blocks) + header + bytes(64 * blocks)
    try:
        frames = read(data)
    except LinkProtocolError:
        return
    for tensor in frames[0].tensors:
        assert tensor.nbytes == DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape) <= 64 * blocks


def test_bfloat16_and_zero_length_tensors_travel() -> None:
    sent = [
        TensorData("float32", (0, 7), b""),
        TensorData("bfloat16", (3,), b"\x80\x3f\x00\x40\x40\x40"),
        TensorData("int64", (2, 0), b""),
    ]
    for tensors in (sent, sent[:1], sent[1:2]):
        (frame,) = read(encoded(Kind.RESPONSE, 1, {}, *tensors))
        assert plain(frame.tensors) == plain(tensors)


def test_a_frame_without_tensors_has_none() -> None:
    (frame,) = read(encoded(Kind.CANCEL, 9))
    assert (frame.kind, frame.stream, frame.header, frame.tensors) == (Kind.CANCEL, 9, {}, [])


def test_headers_longer_than_the_receive_buffer() -> None:
    text = "x" * (3 * RECEIVE_BYTES)
    data = encoded(Kind.PING) + encoded(Kind.REQUEST, 2, {"h": text}, TensorData("int32", (1,), b"abcd"))
    data += encoded(Kind.PING) * 3
    reader = FrameReader(LARGE, LARGE)
    for sizes in ((), (1000,), (RECEIVE_BYTES - 1,)):
        frames = feed(reader, data, sizes)
        assert [frame.kind for frame in frames] == [Kind.PING, Kind.REQUEST, Kind.PING, Kind.PING, Kind.PING]
        assert frames[1].header["h"] == text
        assert bytes(frames[1].tensors[0].data) == b"abcd"
    assert len(reader.get_buffer()) == RECEIVE_BYTES  # a long header does not hold its memory for ever


@pytest.mark.parametrize("length", [RECEIVE_BYTES + extra for extra in (-2, -1, 0, 1, 2)])
def test_headers_around_the_size_of_the_receive_buffer(length: int) -> None:
    text = b"x" * (length - PREFIX.size - 10)
    packed = b"\x82\xa1h\xc6" + struct.pack(">I", len(text)) + text + b"\xa0\xc0"  # {"h": text, "": None}
    data = prefix(header=len(packed)) + packed
    assert len(data) == length
    for sizes in ((), (1000,), (RECEIVE_BYTES,)):
        frames = read(data + encoded(Kind.PING), sizes=sizes)
        assert [frame.header.get("h") for frame in frames] == [text, None]


@pytest.mark.parametrize("extra", [-65, -64, -1, 0, 1, 64, 65])
def test_bodies_around_the_size_of_the_receive_buffer(extra: int) -> None:
    head = len(encode_frame(Kind.ITEM, 1, {}, [TensorData("int32", (1,), bytes(4))])[0])
    for size in (RECEIVE_BYTES - head, RECEIVE_BYTES, 2 * RECEIVE_BYTES - head):
        count = (size + extra) // 4
        content = np.random.default_rng(count).bytes(4 * count)
        data = encoded(Kind.ITEM, 1, {}, TensorData("int32", (count,), content)) + encoded(Kind.PING)
        for sizes in ((), (7919,), (RECEIVE_BYTES,)):
            frames = read(data, sizes=sizes)
            assert [frame.kind for frame in frames] == [Kind.ITEM, Kind.PING]
            assert bytes(frames[0].tensors[0].data) == content


def test_many_small_frames_in_one_read() -> None:
    data = b"".join(encoded(Kind.REQUEST, stream, {"m": "a"}) for stream in range(5000))
    assert [frame.stream for frame in read(data)] == list(range(5000))


def test_encoding_copies_no_tensor_bytes_and_aligns_the_body() -> None:
    array = np.arange(1000, dtype=np.float32)
    buffers = encode_frame(Kind.ITEM, 1, {"h": "odd"}, [TensorData("float32", (1000,), array.data)])
    assert len(buffers[0]) % ALIGNMENT == 0
    array[0] = 5.0
    assert bytes(buffers[1])[:4] == struct.pack("<f", 5.0)
    assert sum(len(buffer) for buffer in buffers) % ALIGNMENT == 0  # `len` is the size in bytes of each


def test_received_tensors_are_views_of_one_body() -> None:
    (frame,) = read(encoded(Kind.ITEM, 1, {}, *[TensorData("int32", (1,), bytes(4))] * 2))
    first, second = (np.frombuffer(tensor.data, np.uint8) for tensor in frame.tensors)
    first[:] = 255
    assert (second == 0).all()
    distance = second.__array_interface__["data"][0] - first.__array_interface__["data"][0]
    assert distance == ALIGNMENT


@pytest.mark.parametrize("data", [np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)[:, :2].copy()])
def test_buffers_of_any_shape_count_in_bytes(data: np.ndarray) -> None:
    buffers = encode_frame(Kind.ITEM, 1, {}, [TensorData("float32", data.shape, data.data)])
    assert len(buffers[1]) == data.nbytes


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorData("float32", (2,), bytes(7)), "needs 8 B, has 7"),
        (TensorData("float32", (2,), bytes(12)), "needs 8 B, has 12"),
        (TensorData("uint8", (2,), bytes(2)), "'uint8' is not one of float64"),
    ],
)
def test_tensors_that_cannot_travel_are_refused(tensor: TensorData, message: str) -> None:
    with pytest.raises(LinkProtocolError, match=message):
        encode_frame(Kind.ITEM, 1, {}, [tensor])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (prefix(magic=b"HTTP"), "does not speak"),
        (prefix(version=VERSION + 1), "does not speak"),
        (prefix(padding=1), "does not speak"),
        (prefix(kind=0), "unknown frame kind 0"),
        (prefix(kind=99), "unknown frame kind 99"),
        (prefix(header=1) + b"\xc1", "not msgpack"),
        (prefix(header=2) + b"\xa1\xff", "not msgpack"),  # invalid UTF-8
        (prefix(header=1) + b"\x01", "int, not a map"),
        (prefix(header=3) + b"\x81\x01\x02", "not msgpack"),  # keys must be text or bytes
        (prefix(header=5) + b"\xdf\xff\xff\xff\xff", "not msgpack"),  # a map of 4 billion entries
        (prefix(header=9) + b"\x81\xa1a" + msgpack.packb(msgpack.ExtType(5, b"abc")), "extension type 5 refused"),
    ],
)
def test_bytes_that_are_no_frame(data: bytes, message: str) -> None:
    with pytest.raises(LinkProtocolError, match=message):
        read(data)


def test_the_timestamp_extension_becomes_a_plain_number() -> None:
    header = msgpack.packb({"h": msgpack.Timestamp(3)})
    (frame,) = read(prefix(header=len(header)) + header)
    assert type(frame.header["h"]) is float


@pytest.mark.parametrize(
    "described",
    [
        [["float32", [17]]],  # more than the body
        [["float32", [16]], ["float32", [1]]],
        [["float32", [-1, -16]]],
        [["float32", [-1]]],
        [["float32", [2**63, 2**63]]],
        [["float32", [1] * 33]],
        [["uint8", [1]]],
        [["float32", 3]],
        [["float32"]],
        ["ab"],
        17,
        [[["float32"], [1]]],
    ],
)
def test_tensor_descriptions_that_cannot_be(described: Any) -> None:
    header = msgpack.packb({"t": described})
    with pytest.raises(LinkProtocolError):
        read(prefix(header=len(header), body=64) + header + bytes(64))


@pytest.mark.parametrize("lengths", [{"header": 4097}, {"body": 8193}, {"header": 2**32 - 1, "body": 2**64 - 1}])
def test_limits_hold_before_anything_is_allocated(lengths: dict[str, int]) -> None:
    reader = FrameReader(4096, 8192)
    data = prefix(**lengths)
    reader.get_buffer()[: len(data)] = data
    tracemalloc.start()
    try:
        with pytest.raises(LinkProtocolError, match="over the link's limits"):
            reader.buffer_updated(len(data))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_frames_exactly_at_the_limits_pass() -> None:
    data = encoded(Kind.ITEM, 1, {"h": "abc"}, TensorData("int32", (32,), bytes(128)))
    header_bytes, body_bytes = PREFIX.unpack_from(data)[-2:]
    assert len(read(data, header_bytes, body_bytes)) == 1
    for limits in ((header_bytes - 1, body_bytes), (header_bytes, body_bytes - 1)):
        with pytest.raises(LinkProtocolError, match="over"):
            read(data, *limits)


def test_limits_may_be_raised_later() -> None:
    reader = FrameReader(64, 0)
    assert len(feed(reader, encoded(Kind.PING))) == 1
    reader.max_header_bytes, reader.max_body_bytes = 4096, 4096
    assert len(feed(reader, encoded(Kind.ITEM, 1, {}, TensorData("int32", (9,), bytes(36))))) == 1
