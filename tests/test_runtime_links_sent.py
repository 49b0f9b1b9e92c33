"""Packed calls: their frames, their ends of a link, and those that a pool sends without anybody who waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from link_peers import SECRET, Transport, linked, scripted_server, welcome
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidTensorError,
    LinkProtocolError,
    PayloadTooLargeError,
    UnavailableError,
)
from pimoe.runtime.links import Call, Endpoint, LinkClient, LinkLimits, LinkPool, LinkServer, Packed, Reply
from pimoe.runtime.links.addresses import new_unix_address
from pimoe.runtime.links.frames import FrameReader, Kind, encode_frame, encode_packed, pack_call, unpack_call
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TIMEOUT_S = 20.0
TINY_S = 0.02
LARGE = 2**20


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


def echo(call: Call) -> Packed:
    assert call.packed is not None
    return Packed(call.method.encode() + call.packed.meta, call.packed.body)


async def never(call: Call) -> Packed:
    await asyncio.Event().wait()
    raise AssertionError


def soon() -> float:
    return asyncio.get_running_loop().time() + TIMEOUT_S


# Frames

packed_values = st.builds(Packed, st.binary(max_size=80), st.lists(st.binary(max_size=200), max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.lists(packed_values, min_size=1, max_size=3), st.integers(1, 90))
def test_packed_frames_cut_anywhere_come_out_equal(sent: list[Packed], size: int) -> None:
    frames = [
        *(encode_packed(Kind.PACKED_REQUEST, n, each) for n, each in enumerate(sent)),
        encode_frame(Kind.PING, 9),
    ]
    data = b"".join(b"".join(buffers) for buffers in frames)
    reader, received = FrameReader(LARGE, LARGE), []
    for start in range(0, len(data), size):
        for byte in data[start : start + size]:
            reader.get_buffer()[:1] = bytes([byte])
            received += reader.buffer_updated(1)
    assert [frame.stream for frame in received] == [*range(len(sent)), 9]
    for frame, each in zip(received, sent, strict=False):
        assert frame.packed is not None
        assert frame.packed.meta == each.meta
        assert b"".join(frame.packed.body) == b"".join(each.body)


def test_a_packed_calls_own_part_comes_out_equal() -> None:
    assert unpack_call(pack_call(1.5, b"experts", b"\x00rest")) == (1.5, "experts", b"\x00rest")


@pytest.mark.parametrize(
    "meta", [b"", b"\x00" * 8, pack_call(1.0, b"abc", b"")[:-1], pack_call(1.0, b"\xff", b"")]
)
def test_what_is_no_packed_call_is_refused(meta: bytes) -> None:
    with pytest.raises(LinkProtocolError, match="packed call"):
        unpack_call(meta)


# Over a link


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_packed_calls_are_answered_whatever_their_size(transport: Transport) -> None:
    async with linked(echo, transport) as (server, client):
        for body in ([], [b"abc", b"", memoryview(b"defg")], [bytes(70_000)], [b"x" * 3_000_000, b"y" * 5]):
            answer = await client.call_packed("m", Packed(b"-meta", body), TIMEOUT_S)
            assert answer.meta == b"m-meta"
            assert b"".join(answer.body) == b"".join(body)
        assert client.in_flight == 0
        assert server.calls == 4


async def test_a_packed_call_may_be_answered_later_and_fail() -> None:
    async def later(call: Call) -> Packed:
        await asyncio.sleep(0)
        if call.method == "bad":
            raise InvalidTensorError("no such layer")
        return echo(call)

    async with linked(later) as (_, client):
        assert (await client.call_packed("m", Packed(b""), TIMEOUT_S)).meta == b"m"
        with pytest.raises(InvalidTensorError, match="no such layer"):
            await client.call_packed("bad", Packed(b""), TIMEOUT_S)


async def test_an_answer_of_the_other_kind_costs_its_call_only() -> None:
    async with linked(lambda call: Reply() if call.packed is not None else Packed(b"")) as (_, client):
        with pytest.raises(LinkProtocolError, match="another kind"):
            await client.call_packed("m", Packed(b""), TIMEOUT_S)
        with pytest.raises(LinkProtocolError, match="another kind"):
            await client.call("m", {}, [], TIMEOUT_S)
        assert not client.closed


@pytest.mark.parametrize("meta", [b"", pack_call(float("nan"), b"m", b"")])
async def test_a_bad_packed_call_costs_its_link_only(meta: bytes) -> None:
    async with linked(echo) as (server, client):
        other = await LinkClient.connect(server.addresses[0], SECRET)
        client._connection.send_packed(Kind.PACKED_REQUEST, 1, Packed(meta))
        await eventually(lambda: client.closed)
        assert (await other.call_packed("m", Packed(b""), TIMEOUT_S)).meta == b"m"
        await other.close()


async def test_a_packed_frame_over_the_limits_is_not_sent() -> None:
    async with linked(echo, limits=LinkLimits(max_body_bytes=1000)) as (server, client):
        with pytest.raises(PayloadTooLargeError):
            await client.call_packed("m", Packed(b"", [bytes(1001)]), TIMEOUT_S)
        assert (client.in_flight, server.calls) == (0, 0)


async def test_deadlines_end_calls_one_by_one() -> None:
    async with scripted_server() as (address, peers):
        client = await LinkClient.connect(address, SECRET)
        long = asyncio.create_task(client.call_packed("long", Packed(b""), TIMEOUT_S))
        for _ in range(3):  # each is earlier than the deadline that is watched
            with pytest.raises(DeadlineExceededError, match="short was not answered"):
                await client.call_packed("short", Packed(b""), TINY_S)
        assert not long.done()
        await eventually(lambda: len(peers[0].of(Kind.CANCEL)) == 3)
        await client.close()
        with pytest.raises(Exception, match="closed"):
            await long


# Sent by a pool


class Outcomes:
    """What `done` was told, call by call."""

    def __init__(self) -> None:
        self.told: list[Packed | BaseException] = []

    def done(self, outcome: Packed | BaseException) -> None:
        self.told.append(outcome)

    async def next(self) -> Packed | BaseException:
        await eventually(lambda: self.told)
        return self.told.pop(0)


@contextlib.asynccontextmanager
async def pooled(
    *handlers: Callable[[Call], Any], credits: int | None = 1, **options: Any
) -> AsyncIterator[tuple[LinkPool, list[LinkServer]]]:
    """A pool of one replica for each handler."""
    servers = [LinkServer(handler, SECRET, credits=credits) for handler in handlers]
    for server in servers:
        await server.listen_unix(new_unix_address())

    async def discover() -> Sequence[Endpoint]:
        return [Endpoint(str(n), "node", tuple(s.addresses)) for n, s in enumerate(servers) if not s.closing]

    pool = LinkPool("group-0", discover, SECRET, "node", refresh_s=0.01, **options)
    await pool.start()
    try:
        yield pool, servers
    finally:
        await pool.close()
        for server in servers:
            await server.close()


async def test_what_is_sent_is_on_its_way_without_a_task() -> None:
    async with pooled(echo, credits=2) as (pool, _):
        outcomes = Outcomes()
        before = len(asyncio.all_tasks())
        for n in range(2):
            pool.send("m", Packed(b"%d" % n), soon(), outcomes.done)
        assert len(asyncio.all_tasks()) == before
        assert pool.statistics().in_flight == 2
        assert [await outcomes.next(), await outcomes.next()] == [Packed(b"m0", (b"",)), Packed(b"m1", (b"",))]
        assert pool.statistics().in_flight == 0


async def test_what_is_sent_waits_for_a_credit() -> None:
    gate = asyncio.Event()

    async def gated(call: Call) -> Packed:
        await gate.wait()
        return echo(call)

    async with pooled(gated) as (pool, servers):
        outcomes = Outcomes()
        for n in range(3):
            pool.send("m", Packed(b"%d" % n), soon(), outcomes.done)
        await eventually(lambda: servers[0].statistics().streams == 1)
        assert pool.statistics().in_flight == 1
        gate.set()
        assert {(await outcomes.next()).meta for _ in range(3)} == {b"m0", b"m1", b"m2"}  # type: ignore[union-attr]


async def test_a_dead_replicas_call_goes_to_its_sibling() -> None:
    async with pooled(never, echo) as (pool, servers):
        pool.links["1"].in_flight += 1  # so that the first is chosen
        outcomes = Outcomes()
        pool.send("m", Packed(b""), soon(), outcomes.done)
        await eventually(lambda: servers[0].statistics().streams == 1)
        pool.links["1"].in_flight -= 1
        await servers[0].close()
        assert await outcomes.next() == Packed(b"m", (b"",))
        assert pool.resent == 1


async def test_a_silent_replicas_call_goes_to_its_sibling() -> None:
    async with pooled(never, echo, attempt_timeout_s=TINY_S) as (pool, _):
        pool.links["1"].in_flight += 1
        outcomes = Outcomes()
        pool.send("m", Packed(b""), soon(), outcomes.done)
        pool.links["1"].in_flight -= 1
        assert await outcomes.next() == Packed(b"m", (b"",))
        assert pool.resent == 1


async def test_errors_are_told_as_they_are() -> None:
    def fail(call: Call) -> Packed:
        raise InvalidTensorError("no such layer")

    async with pooled(fail, credits=None) as (pool, _):
        outcomes = Outcomes()
        loop = asyncio.get_running_loop()
        pool.send("m", Packed(b""), soon(), outcomes.done)
        assert isinstance(await outcomes.next(), InvalidTensorError)
        pool.send("m", Packed(b""), loop.time() - 1, outcomes.done)
        assert isinstance(await outcomes.next(), DeadlineExceededError)
        await pool.close()
        pool.send("m", Packed(b""), soon(), outcomes.done)
        assert isinstance(await outcomes.next(), UnavailableError)


async def test_what_is_cancelled_is_told_to_the_server_and_to_nobody_else() -> None:
    async with pooled(never) as (pool, servers):
        outcomes = Outcomes()
        at_work = pool.send("m", Packed(b""), soon(), outcomes.done)
        waiting = pool.send("m", Packed(b""), soon(), outcomes.done)
        await eventually(lambda: servers[0].statistics().streams == 1)
        assert at_work.cancel() is None
        task = waiting.cancel()
        assert task is not None
        await within_patience(asyncio.wait([task]))
        await eventually(lambda: servers[0].statistics().streams == 0)
        assert pool.statistics().in_flight == 0
        assert outcomes.told == []


async def test_a_server_that_answers_in_its_own_kind_only() -> None:
    """The greeting of a scripted server, and a plain answer to a packed call that was sent."""

    def answer(peer: Any, frame: Any) -> None:
        welcome(peer, frame)
        if frame.kind is Kind.PACKED_REQUEST:
            peer.send(Kind.RESPONSE, frame.stream, {"h": {}})

    async with scripted_server(answer) as (address, _):

        async def discover() -> Sequence[Endpoint]:
            return [Endpoint("0", "node", (address,))]

        pool = LinkPool("group-0", discover, SECRET, "node")
        await pool.start()
        outcomes = Outcomes()
        pool.send("m", Packed(b""), soon(), outcomes.done)
        assert isinstance(await outcomes.next(), LinkProtocolError)
        await pool.close()
