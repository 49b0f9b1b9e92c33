"""Large bodies through memory that both ends of a Unix link map, and through the socket where that cannot be."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import math
import mmap
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import uvloop
from link_peers import SECRET, Peer, linked, scripted_server, serving
from pimoe.runtime.errors import LinkAuthenticationError, LinkProtocolError
from pimoe.runtime.links import Call, LinkClient, LinkLimits, Reply
from pimoe.runtime.links.frames import Frame, FrameReader, Kind, encode_frame, with_shared_body
from pimoe.runtime.links.shared_memory import Offer, Outbox, SharedMemory, accept
from pimoe.runtime.requests import TensorData
from waiting import eventually, nothing_left_behind

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


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
    made = Offer(half_bytes)
    server = accept(made.described(), half_bytes)
    assert server is not None
    client = made.accepted()
    made.close()
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


def no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)


def another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As builds for older systems are."""
    monkeypatch.delattr(os, "memfd_create")


@pytest.mark.parametrize("prepare", [no_descriptors, another_python])
async def test_no_memory_for_it_is_no_failure(
    prepare: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch)
    async with linked(echo, "unix") as (_, client):
        assert under_way(client) is None
        await ask(client, large())


async def test_more_than_there_can_be_is_no_failure() -> None:
    async with linked(echo, "unix", limits=LinkLimits(shared_memory_bytes=2**62)) as (_, client):
        assert under_way(client) is None
        await ask(client, large())


async def test_from_64_kb() -> None:
    async with linked(echo, "unix") as (_, client):
        assert is_shared((await ask(client, large(0, 65_536)))[0])
        assert not is_shared((await ask(client, large(0, 65_468)))[0])  # with its padding 64 bytes less


async def test_bodies_outlive_their_link() -> None:
    async with linked(echo, "unix") as (_, client):
        (answer,) = await ask(client, large())
    gc.collect()
    assert is_shared(answer)
    assert bytes(answer.data) == large().data


def descriptors() -> int:
    """Of shared memory."""
    gc.collect()
    names = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum("memfd:pimoe-link" in name for name in names)


async def test_links_leave_no_descriptors() -> None:
    async with linked(echo, "unix") as (server, _):
        assert descriptors() == 2  # one for each end's mapping
        for _ in range(3):
            client = await LinkClient.connect(server.addresses[0], server.secret)
            await ask(client, large())
            assert descriptors() == 4
            await client.close()
            await eventually(lambda: descriptors() == 2)
        with pytest.raises(LinkAuthenticationError):
            await LinkClient.connect(server.addresses[0], b"another")
        await eventually(lambda: descriptors() == 2)


async def test_connecting_may_be_cancelled_at_any_moment() -> None:
    async with serving(echo, "unix") as server:
        for turns in range(60):
            connecting = asyncio.create_task(LinkClient.connect(server.addresses[0], server.secret))
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            with suppress(asyncio.CancelledError):
                await (await connecting).close()
        await eventually(lambda: descriptors() == 0)


async def test_a_server_greets_once() -> None:
    def greets_again(peer: Peer, frame: Frame) -> None:
        peer.send(Kind.HELLO, 0, {"nonce": bytes(32)})

    async with scripted_server(greets_again) as (address, _):
        with pytest.raises(LinkProtocolError, match="its second"):
            await LinkClient.connect(address, SECRET)
    await eventually(lambda: descriptors() == 0)


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


def test_what_cannot_be_put_takes_no_room() -> None:
    client, _ = pair(PAGE)
    with pytest.raises(TypeError):
        client.outbox.put(["text"], 4)  # type: ignore[list-item]
    assert client.outbox.put([bytes(PAGE)], PAGE) is not None


class ChangingMarks:
    """Marks of slots, the last of which its reader clears after each look at any."""

    def __init__(self) -> None:
        self.marks = bytearray(128)

    def __setitem__(self, slot: int, value: int) -> None:
        self.marks[slot] = value

    def __getitem__(self, slot: int) -> int:
        value = self.marks[slot]
        self.marks[127] = 0
        return value

    def __bytes__(self) -> bytes:
        seen = bytes(self.marks)
        self.marks[127] = 0
        return seen


def test_no_slot_is_lost_when_its_reader_drops_it_during_the_look() -> None:
    outbox = Outbox(ChangingMarks(), memoryview(bytearray(1000)))  # type: ignore[arg-type]
    for _ in range(300):
        assert outbox.put([b"x"], 1) is not None
        outbox._forget_dropped()
    assert sorted(outbox._free_slots + [slot for *_, slot in outbox._used]) == list(range(128))


def test_a_slot_is_forgotten_before_its_sender_may_use_it_again() -> None:
    client, server = pair()
    slot, place = client.outbox.put([b"x"], 1) or (0, 0)
    body = server.inbox.body(slot, place, 1)
    seen = []

    class Marks:
        def __setitem__(self, slot: int, value: int) -> None:
            seen.append((slot, value, slot in server.inbox._read))

    server.inbox._marks = Marks()  # type: ignore[assignment]
    del body
    assert seen == [(slot, 0, False)]


def test_a_forked_process_gives_nothing_back() -> None:
    client, server = pair(PAGE)
    slot, place = client.outbox.put([bytes(PAGE)], PAGE) or (0, 0)
    body = server.inbox.body(slot, place, PAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, in newer Pythons
        child = os.fork()
    if child == 0:
        del body
        os._exit(0)
    os.waitpid(child, 0)
    assert client.outbox.put([bytes(PAGE)], PAGE) is None
    assert bytes(body) == bytes(PAGE)


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


def copied(described: dict[str, Any], *seals: int, name: str = "pimoe-link", size: int = 4096 + 2 * HALF) -> Any:
    """The same header in other memory, left open by its number."""
    descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    os.pwrite(descriptor, os.pread(described["fd"], 64, 0), 0)
    for seal in seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal)
    return {**described, "fd": descriptor}


SEALS = fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK


def plain_file(described: dict[str, Any]) -> Any:
    return {**described, "fd": os.open("/dev/null", os.O_RDWR)}


def another_name(described: dict[str, Any]) -> Any:
    return copied(described, *SEALS, name="another")


def may_shrink(described: dict[str, Any]) -> Any:
    return copied(described, fcntl.F_SEAL_GROW)


def may_grow(described: dict[str, Any]) -> Any:
    return copied(described, fcntl.F_SEAL_SHRINK)


def shorter(described: dict[str, Any]) -> Any:
    return copied(described, *SEALS, size=4096 + HALF)


def other_magic(described: dict[str, Any]) -> Any:
    made = copied(described, *SEALS)
    os.pwrite(made["fd"], b"PMOESHM2", 0)
    return made


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
        lambda it: {**it, "pid": math.inf},
        plain_file,
        another_name,
        may_shrink,
        may_grow,
        shorter,
        other_magic,
    ],
)
def test_offers_of_something_else_are_not_taken(altered: Callable[[dict[str, Any]], object]) -> None:
    made = Offer(HALF)
    described: Any = altered(made.described())
    try:
        assert accept(described, HALF) is None
        assert accept(made.described(), HALF) is not None
    finally:
        other = described.get("fd") if isinstance(described, dict) else None
        if other not in (made.described()["fd"], 10**6, None):
            os.close(other)
        made.close()


def test_the_same_header_in_sealed_memory_would_be_taken() -> None:
    """So that what the others are refused for is what they lack."""
    made = Offer(HALF)
    described = copied(made.described(), *SEALS)
    assert accept(described, HALF) is not None
    os.close(described["fd"])
    made.close()


def test_larger_ones_than_agreed_are_not_taken() -> None:
    made = Offer(HALF)
    assert accept(made.described(), HALF // 2) is None
    made.close()


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
