"""Large bodies through memory that both ends of a Unix link map, and through the socket where that cannot be."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from link_peers import linked
from pimoe.runtime.errors import LinkProtocolError
from pimoe.runtime.links import Call, LinkClient, LinkLimits, Reply
from pimoe.runtime.links.frames import FrameReader, Kind, encode_frame, with_shared_body
from pimoe.runtime.links.shared_memory import Offer, SharedMemory, accept
from pimoe.runtime.requests import TensorData
from waiting import eventually, nothing_left_behind

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TIMEOUT_S = 20.0
LARGE = 300_000
HALF = 2**20
PAGE = mmap.PAGESIZE


def large(seed: int = 0, size: int = LARGE) -> TensorData:
    return TensorData("int32", (size // 4,), np.random.default_rng(seed).bytes(size))


def echo(call: Call) -> Reply:
    return Reply({}, call.tensors)


def pair(half_bytes: int = HALF) -> tuple[SharedMemory, SharedMemory]:
    """The client's end and the server's."""
    offer = Offer(half_bytes)
    server = accept(offer.described(), half_bytes)
    assert server is not None
    client = offer.accepted()
    offer.close()
    return client, server


def under_way(client: LinkClient) -> int | None:
    """Bodies that the client has put into shared memory and that the server still holds; None: it has none."""
    outbox = client._connection._outbox
    return None if outbox is None else sum(outbox._marks)


async def ask(client: LinkClient, *tensors: TensorData) -> list[TensorData]:
    reply = await client.call("m", {}, tensors, TIMEOUT_S)
    assert [bytes(back.data) for back in reply.tensors] == [bytes(sent.data) for sent in tensors]
    return list(reply.tensors)


def is_shared(tensor: TensorData) -> bool:
    assert isinstance(tensor.data, memoryview)
    return isinstance(tensor.data.obj.base, mmap.mmap)


# Over a link


async def test_large_bodies_go_through_shared_memory_both_ways_and_small_ones_do_not() -> None:
    held: list[list[TensorData]] = []

    def handler(call: Call) -> Reply:
        held.append(call.tensors)
        return echo(call)

    async with linked(handler, "unix") as (_, client):
        answers = [
            await ask(client, large()),
            await ask(client, large(1, 100)),
            await ask(client, large(2), large(3)),
        ]
        assert [is_shared(tensors[0]) for tensors in held] == [True, False, True]
        assert [is_shared(tensors[0]) for tensors in answers] == [True, False, True]
        # The memory is the receiver's to use up.
        memoryview(answers[0][0].data)[:3] = b"abc"
        assert under_way(client) == 2
        held.clear()
        answers.clear()
        gc.collect()
        assert under_way(client) == 0
        await ask(client, large(4))


async def test_without_room_bodies_go_through_the_socket() -> None:
    async with linked(echo, "unix", limits=LinkLimits(shared_memory_bytes=2 * LARGE)) as (_, client):
        kept = [await ask(client, large(seed)) for seed in range(5)]
        shared = [is_shared(tensors[0]) for tensors in kept]
        assert shared == [True, True, False, False, False]
        assert [bytes(tensors[0].data) for tensors in kept] == [large(seed).data for seed in range(5)]
        del kept[0]
        gc.collect()
        assert is_shared((await ask(client, large(9)))[0])
        assert not is_shared((await ask(client, large(10, 3 * LARGE)))[0])


@pytest.mark.parametrize(
    ("transport", "client_bytes", "server_bytes"),
    [("tcp", HALF, HALF), ("unix", 0, HALF), ("unix", HALF, 0), ("unix", HALF, PAGE)],
    ids=["tcp", "off at the client", "off at the server", "more than the server takes"],
)
async def test_where_it_cannot_be_the_socket_has_all(transport: Any, client_bytes: int, server_bytes: int) -> None:
    limits = LinkLimits(shared_memory_bytes=server_bytes)
    async with linked(echo, transport, limits=limits) as (server, _):
        client = await LinkClient.connect(
            server.addresses[0], server.secret, LinkLimits(shared_memory_bytes=client_bytes)
        )
        try:
            assert under_way(client) is None
            assert not is_shared((await ask(client, large()))[0])
        finally:
            await client.close()


async def test_no_memory_for_it_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)
    async with linked(echo, "unix") as (_, client):
        assert under_way(client) is None
        await ask(client, large())


async def test_bodies_outlive_their_link() -> None:
    async with linked(echo, "unix") as (_, client):
        (answer,) = await ask(client, large())
    gc.collect()
    assert is_shared(answer)
    assert bytes(answer.data) == large().data


async def test_links_leave_no_descriptors() -> None:
    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    async with linked(echo, "unix") as (server, _):
        before = opened()
        for _ in range(3):
            client = await LinkClient.connect(server.addresses[0], server.secret)
            await ask(client, large())
            await client.close()
        with pytest.raises(Exception, match="secret"):
            await LinkClient.connect(server.addresses[0], b"another")
        await eventually(lambda: opened() == before)


# One direction


def test_places_are_used_again_lowest_first() -> None:
    client, server = pair(PAGE)
    assert client.outbox.put([b"a" * 1000], 1000) == (127, 0)
    slot, place = client.outbox.put([b"b" * 500, b"c" * 500], 1000) or (0, 0)
    assert place == 1024  # aligned
    body = server.inbox.body(slot, place, 1000)
    assert bytes(body) == b"b" * 500 + b"c" * 500
    assert client.outbox.put([bytes(3000)], 3000) is None
    first = server.inbox.body(127, 0, 1000)
    part = first[5:10]
    del first
    assert client.outbox.put([bytes(3000)], 3000) is None  # part of it is held
    del part
    assert client.outbox.put([bytes(1000)], 1000) == (127, 0)
    del body
    assert client.outbox.put([bytes(3000)], 3000) == (slot, 1024)


def test_bytes_may_be_signed() -> None:
    client, server = pair()
    slot, place = client.outbox.put([np.arange(-3, 3, dtype=np.int8).data, bytearray(b"z")], 7) or (0, 0)
    assert bytes(server.inbox.body(slot, place, 7)) == b"\xfd\xfe\xff\x00\x01\x02z"


def test_the_last_view_may_go_on_any_thread() -> None:
    client, server = pair()
    slot, place = client.outbox.put([bytes(LARGE)], LARGE) or (0, 0)
    held = [server.inbox.body(slot, place, LARGE)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert client.outbox.put([bytes(LARGE)], LARGE) == (slot, place)


def test_there_are_as_many_slots_as_there_are() -> None:
    client, _ = pair()
    assert sum(client.outbox.put([b"x"], 1) is not None for _ in range(200)) == 128


def test_both_halves_are_apart() -> None:
    client, server = pair(PAGE)
    there, back = client.outbox.put([b"a" * PAGE], PAGE), server.outbox.put([b"b" * PAGE], PAGE)
    assert there == back == (127, 0)
    assert bytes(server.inbox.body(127, 0, PAGE)) == b"a" * PAGE
    assert bytes(client.inbox.body(127, 0, PAGE)) == b"b" * PAGE


@pytest.mark.parametrize(
    ("slot", "place", "size"), [(128, 0, 1), (0, HALF, 1), (0, 2**63, 1), (0, 1, HALF), (5, 0, 1)]
)
def test_bodies_that_cannot_be_are_refused(slot: int, place: int, size: int) -> None:
    _, server = pair()
    held = server.inbox.body(5, 0, 1)
    with pytest.raises(LinkProtocolError, match="no body of"):
        server.inbox.body(slot, place, size)
    assert held is not None


# Offers that are refused


def plain_file(described: dict[str, Any]) -> dict[str, Any]:
    descriptor = os.open("/dev/null", os.O_RDWR)  # left open: its number must stay another's
    return {**described, "fd": descriptor}


def unsealed(described: dict[str, Any]) -> dict[str, Any]:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096 + 2 * HALF)
    return {**described, "fd": descriptor}


@pytest.mark.parametrize(
    "altered",
    [
        lambda _: None,
        lambda _: "memory",
        lambda _: {},
        lambda it: {**it, "pid": 2**40},
        lambda it: {**it, "pid": "self/../1"},
        lambda it: {**it, "fd": 10**6},
        lambda it: {**it, "fd": None},
        lambda it: {**it, "token": bytes(32)},
        lambda it: {**it, "token": 5},
        plain_file,
        unsealed,
    ],
)
def test_offers_of_something_else_are_not_taken(altered: Callable[[dict[str, Any]], object]) -> None:
    offer = Offer(HALF)
    described = altered(offer.described())
    try:
        assert accept(described, HALF) is None
        assert accept(offer.described(), HALF) is not None
    finally:
        offer.close()
        if isinstance(described, dict) and altered in (plain_file, unsealed):
            os.close(described["fd"])


def test_larger_ones_than_agreed_are_not_taken() -> None:
    offer = Offer(HALF)
    assert accept(offer.described(), HALF // 2) is None
    offer.close()


# Frames


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_frames_with_shared_bodies_may_be_cut_anywhere(cut: int) -> None:
    client, server = pair()
    reader = FrameReader(2**20, 2**20)
    reader.inbox = server.inbox
    head, *body = encode_frame(Kind.ITEM, 7, {"h": {"n": 1}}, [large()])
    put = client.outbox.put(body, sum(map(len, body)))
    assert put is not None
    data = bytes(with_shared_body(head, *put)) + b"".join(encode_frame(Kind.PING, 8))
    frames = []
    for part in (data[:cut], data[cut:]):
        reader.get_buffer()[: len(part)] = part
        frames += reader.buffer_updated(len(part)) if part else []
    assert [(frame.kind, frame.stream) for frame in frames] == [(Kind.ITEM, 7), (Kind.PING, 8)]
    assert bytes(frames[0].tensors[0].data) == large().data


def test_a_shared_body_where_nothing_is_shared_ends_the_link() -> None:
    reader = FrameReader(2**20, 2**20)
    head, *_ = encode_frame(Kind.ITEM, 7, {}, [large()])
    data = with_shared_body(head, 0, 0)
    reader.get_buffer()[: len(data)] = data
    with pytest.raises(LinkProtocolError, match="there is none"):
        reader.buffer_updated(len(data))
