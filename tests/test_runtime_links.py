"""Links end to end: calls and streams, on both transports and both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import uvloop
from link_peers import SECRET, Peer, Transport, linked, scripted_server, serving, tensor, welcome
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidTensorError,
    LinkClosedError,
    LinkProtocolError,
    OverloadedError,
    PayloadTooLargeError,
    PimoeError,
    UnavailableError,
)
from pimoe.runtime.links import Call, LinkClient, LinkLimits, Reply
from pimoe.runtime.links.frames import Frame, Kind
from pimoe.runtime.requests import DTYPE_BYTES, TensorData
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TIMEOUT_S = 20.0
TINY_S = 0.02


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> Transport:
    chosen: Transport = request.param
    return chosen


def echo(call: Call) -> Reply:
    return Reply({"method": call.method, **call.meta}, call.tensors)


async def never(call: Call) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


async def collect(items: AsyncGenerator[Reply, None]) -> list[Any]:
    return [item.meta["n"] async for item in items]


def counting(upto: int) -> Callable[[Call], AsyncIterator[Reply]]:
    async def handler(call: Call) -> AsyncIterator[Reply]:
        for n in range(upto):
            yield Reply({"n": n}, [tensor([n])])

    return handler


# Calls


async def test_tensors_come_back_equal_and_uncopied(transport: Transport) -> None:
    sent = [TensorData(name, (3, 5), np.random.default_rng(1).bytes(15 * n)) for name, n in DTYPE_BYTES.items()]
    sent += [TensorData("float32", (0, 8), b""), TensorData("bfloat16", (1_500_000,), bytes(3_000_000))]
    async with linked(echo, transport) as (_, client):
        for tensors in (sent, sent[:1], sent[-2:-1], []):
            reply = await client.call("infer", {"a": 1}, tensors, TIMEOUT_S)
            assert reply.meta == {"method": "infer", "a": 1}
            for back, original in zip(reply.tensors, tensors, strict=True):
                assert (back.dtype, back.shape) == (original.dtype, original.shape)
                assert bytes(back.data) == bytes(original.data)
        reply = await client.call("infer", {}, sent, TIMEOUT_S)
        bodies = {id(back.data.obj) for back in reply.tensors if back.nbytes and isinstance(back.data, memoryview)}
        assert len(bodies) == 1  # all are views of the one body that was received


async def test_calls_are_multiplexed_and_answered_in_any_order(transport: Transport) -> None:
    gates: dict[int, asyncio.Event] = {}

    async def handler(call: Call) -> Reply:
        gate = gates[call.meta["n"]] = asyncio.Event()
        await gate.wait()
        return Reply(call.meta, call.tensors)

    async with linked(handler, transport) as (server, client):
        done: list[int] = []

        async def one(n: int) -> None:
            reply = await client.call("m", {"n": n}, [tensor([n] * 100)], TIMEOUT_S)
            assert bytes(reply.tensors[0].data) == tensor([n] * 100).data
            done.append(reply.meta["n"])

        async with asyncio.TaskGroup() as group:
            for n in range(60):
                group.create_task(one(n))
            await eventually(lambda: len(gates) == 60)
            assert client.in_flight == server.statistics().streams == 60
            for n in reversed(range(60)):
                gates[n].set()
                await eventually(lambda n=n: len(done) == 60 - n)
        assert done == list(reversed(range(60)))
        assert client.in_flight == 0


async def test_immediate_and_later_answers_are_both_answers() -> None:
    async def later(call: Call) -> Reply:
        await asyncio.sleep(0)
        return echo(call)

    async with linked(lambda call: later(call) if call.method == "later" else echo(call)) as (server, client):
        for method in ("now", "later"):
            assert (await client.call(method, {}, [], TIMEOUT_S)).meta == {"method": method}
        assert server.statistics() == (1, 0, 2, 0, 0)


async def test_an_answer_is_not_kept_for_the_rest_of_its_time() -> None:
    async with linked(echo) as (_, client):
        reply: Reply | None = await client.call("m", {}, [tensor([1.0])], 1000.0)
        assert reply is not None
        assert isinstance(reply.tensors[0].data, memoryview)
        body = weakref.ref(reply.tensors[0].data.obj)
        reply = None
        await asyncio.sleep(0)  # the loop's own hand on it
        gc.collect()
        assert body() is None


async def test_stream_numbers_wrap_around() -> None:
    async with linked(echo) as (_, client):
        client._next_stream = 2**32 - 1
        for n in range(3):
            assert (await client.call("m", {"n": n}, [], TIMEOUT_S)).meta["n"] == n
        assert client._next_stream == 3


# Streams


async def test_streams_are_multiplexed_with_calls(transport: Transport) -> None:
    handlers: dict[str, Any] = {"count": counting(200), "echo": echo}
    async with linked(lambda call: handlers[call.method](call), transport) as (server, client):
        streams = [asyncio.create_task(collect(client.stream("count", {}, [], TIMEOUT_S))) for _ in range(3)]
        assert (await client.call("echo", {"x": 1}, [], TIMEOUT_S)).meta["x"] == 1
        assert [await stream for stream in streams] == [list(range(200))] * 3
        assert client.in_flight == 0
        await eventually(lambda: server.statistics().streams == 0)


async def test_a_stream_may_be_empty_and_may_carry_tensors() -> None:
    async with linked(counting(0)) as (_, client):
        assert await collect(client.stream("m", {}, [], TIMEOUT_S)) == []
    async with linked(counting(3)) as (_, client):
        items = [item async for item in client.stream("m", {}, [], TIMEOUT_S)]
        assert [np.frombuffer(item.tensors[0].data, np.float32)[0] for item in items] == [0.0, 1.0, 2.0]


async def test_leaving_a_stream_closes_it_on_the_server() -> None:
    closed = asyncio.Event()

    async def handler(call: Call) -> AsyncIterator[Reply]:
        try:
            for n in range(10**9):
                yield Reply({"n": n})
                await asyncio.sleep(0)
        finally:
            closed.set()

    async with linked(handler) as (server, client):
        async with contextlib.aclosing(client.stream("m", {}, [], TIMEOUT_S)) as items:
            async for item in items:
                if item.meta["n"] == 3:
                    break
        assert client.in_flight == 0
        await within_patience(closed.wait())
        await eventually(lambda: server.statistics().streams == 0)


async def test_a_stream_that_waits_for_its_peer_is_closed_with_its_call() -> None:
    closed = asyncio.Event()
    kept: list[AsyncIterator[Reply]] = []  # so that the garbage collector does not close it

    async def large() -> AsyncIterator[Reply]:
        try:
            while True:
                yield Reply({}, [TensorData("int32", (2**20,), bytes(2**22))])
        finally:
            closed.set()

    def handler(call: Call) -> AsyncIterator[Reply]:
        kept.append(large())
        return kept[0]

    async with serving(handler) as server:
        peer = await Peer.connect(server.addresses[0])
        peer.stop_reading()
        peer.send(Kind.REQUEST, 1, {"m": "m", "s": TINY_S})
        await within_patience(closed.wait())
        await eventually(lambda: server.statistics().streams == 0)
        await peer.close()


async def test_a_handler_may_stream_from_a_plain_iterator() -> None:
    class Items:
        def __init__(self) -> None:
            self.left = 3

        def __aiter__(self) -> Items:
            return self

        async def __anext__(self) -> Reply:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return Reply({"n": self.left})

    async with linked(lambda _: Items()) as (_, client):
        assert await collect(client.stream("m", {}, [], TIMEOUT_S)) == [2, 1, 0]


async def test_a_reader_that_falls_behind_loses_its_stream_and_stops_nobody() -> None:
    handlers: dict[str, Any] = {"count": counting(100), "echo": echo}
    limits = LinkLimits(max_stream_items=4)
    async with linked(lambda call: handlers[call.method](call), limits=limits) as (server, client):
        slow = client.stream("count", {}, [], TIMEOUT_S)
        seen: list[int] = []

        async def read_on() -> None:
            async for item in slow:
                seen.append(item.meta["n"])

        seen.append((await anext(slow)).meta["n"])
        await eventually(lambda: client.in_flight == 0)  # it overflowed while nobody read
        assert (await client.call("echo", {"x": 2}, [], TIMEOUT_S)).meta["x"] == 2
        with pytest.raises(OverloadedError, match="too far behind"):
            await read_on()
        assert seen in (list(range(4)), list(range(5)))  # four waited, besides one that was read perhaps
        await eventually(lambda: server.statistics().streams == 0)


# Deadlines and cancelling


async def test_the_handler_is_told_the_remaining_time() -> None:
    told: list[float] = []

    def handler(call: Call) -> Reply:
        told.append(call.deadline - asyncio.get_running_loop().time())
        return Reply()

    async with linked(handler) as (_, client):
        await client.call("m", {}, [], 1000.0)
        await client.call("m", {}, [], math.inf)
    assert 900 < told[0] < 1000.1
    assert told[1] == math.inf


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
async def test_without_time_nothing_is_sent(timeout_s: float) -> None:
    async with linked(echo) as (server, client):
        with pytest.raises(DeadlineExceededError):
            await client.call("m", {}, [], timeout_s)
        with pytest.raises(DeadlineExceededError):
            await anext(client.stream("m", {}, [], timeout_s))
        await client.call("m", {}, [], TIMEOUT_S)
        assert server.calls == 1


async def test_the_client_keeps_the_deadline_of_a_silent_server() -> None:
    async with scripted_server() as (address, peers):
        client = await LinkClient.connect(address, SECRET)
        with pytest.raises(DeadlineExceededError, match="m was not answered"):
            await client.call("m", {}, [], TINY_S)
        with pytest.raises(DeadlineExceededError, match="s did not end"):
            await collect(client.stream("s", {}, [], TINY_S))
        await eventually(lambda: len(peers[0].of(Kind.CANCEL)) == 2)
        assert not client.closed
        await client.close()


@pytest.mark.parametrize("streams", [False, True])
async def test_the_server_keeps_the_deadline_of_a_silent_client(streams: bool) -> None:
    ended = asyncio.Event()

    async def call(_: Call) -> Reply:
        try:
            return await never(_)
        finally:
            ended.set()

    async def stream(_: Call) -> AsyncIterator[Reply]:
        yield Reply(await call(_))  # type: ignore[arg-type]

    async with serving(stream if streams else call) as server:
        peer = await Peer.connect(server.addresses[0])
        peer.send(Kind.REQUEST, 5, {"m": "m", "s": TINY_S})
        error = await peer.frame(Kind.ERROR)
        assert (error.stream, error.header["code"]) == (5, "deadline_exceeded")
        assert ended.is_set()
        await peer.close()


async def test_a_stream_that_is_read_slowly_does_not_have_its_reader_cancelled() -> None:
    async with linked(counting(2)) as (_, client):
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.2
        items = client.stream("m", {}, [], 0.2)
        assert (await anext(items)).meta["n"] == 0
        await eventually(lambda: client.in_flight == 0)  # all has arrived
        await eventually(lambda: loop.time() > end)  # its time ends while the reader is at work elsewhere
        assert (await anext(items)).meta["n"] == 1
        await items.aclose()


async def test_cancelling_a_call_cancels_its_handler() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(call: Call) -> Reply:
        started.set()
        try:
            return await never(call)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    handlers: dict[str, Any] = {"slow": handler, "echo": echo}
    async with linked(lambda call: handlers[call.method](call)) as (server, client):
        call = asyncio.create_task(client.call("slow", {}, [], TIMEOUT_S))
        await within_patience(started.wait())
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await within_patience(cancelled.wait())
        assert client.in_flight == 0
        await client.call("echo", {}, [], TIMEOUT_S)
        assert server.statistics().streams == 0


@pytest.mark.filterwarnings("error::RuntimeWarning")
async def test_a_call_that_is_cancelled_before_its_handler_began(recwarn: pytest.WarningsRecorder) -> None:
    async with serving(never) as server:
        peer = await Peer.connect(server.addresses[0])
        for stream in range(20):  # both frames arrive in one read
            peer.send(Kind.REQUEST, stream, {"m": "m", "s": TIMEOUT_S})
            peer.send(Kind.CANCEL, stream)
        await eventually(lambda: server.calls == 20)
        await eventually(lambda: server.statistics().streams == 0)
        await peer.close()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


# Errors


def failing(error: Exception, kind: str) -> Callable[[Call], Any]:
    def now(call: Call) -> Reply:
        raise error

    async def later(call: Call) -> Reply:
        await asyncio.sleep(0)
        raise error

    async def amid(call: Call) -> AsyncIterator[Reply]:
        yield Reply({"n": 0})
        raise error

    return {"now": now, "later": later, "amid": amid}[kind]


@pytest.mark.parametrize("kind", ["now", "later", "amid"])
@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", retry_after_s=2.5),
        InvalidTensorError("hidden size", "hidden_states"),
        LinkClosedError("behind the handler"),
        LinkProtocolError("behind the handler"),
    ],
    ids=lambda error: error.code,
)
async def test_errors_arrive_as_they_were_raised(kind: str, error: PimoeError) -> None:
    async with linked(failing(error, kind)) as (server, client):
        items = collect(client.stream("m", {}, [], TIMEOUT_S))
        with pytest.raises(PimoeError) as raised:
            await (items if kind == "amid" else client.call("m", {}, [], TIMEOUT_S))
        items.close()
        assert type(raised.value) is type(error)
        assert raised.value.to_wire() == error.to_wire()
        assert not client.closed
        assert server.statistics().errors == 1


@pytest.mark.parametrize("kind", ["now", "later", "amid"])
@pytest.mark.parametrize("unknown", [ValueError("password hunter2"), TimeoutError("hunter2")])
async def test_unknown_exceptions_do_not_leak_their_text(kind: str, unknown: Exception) -> None:
    async with linked(failing(unknown, kind)) as (_, client):
        with pytest.raises(PimoeError) as raised:
            await collect(client.stream("m", {}, [], TIMEOUT_S))
        assert type(raised.value) is PimoeError
        assert str(raised.value) == f"internal error: {type(unknown).__name__}"


@pytest.mark.parametrize(
    "reply", [Reply({"bad": object()}), Reply({}, [TensorData("uint8", (1,), b"a")]), "nothing of the kind"]
)
@pytest.mark.parametrize("later", [False, True])
async def test_an_answer_that_cannot_be_sent_costs_its_call_only(reply: Any, later: bool) -> None:
    async def wait() -> Any:
        return reply

    handlers: dict[str, Any] = {"echo": echo, "odd": lambda _: wait() if later else reply}
    async with linked(lambda call: handlers[call.method](call)) as (_, client):
        with pytest.raises(PimoeError):
            await client.call("odd", {}, [], TIMEOUT_S)
        await client.call("echo", {}, [], TIMEOUT_S)


async def test_frames_over_the_limits_cost_their_call_only() -> None:
    limits = LinkLimits(max_header_bytes=2048, max_body_bytes=4096)
    sizes = {"header": Reply({"x": "y" * 2048}), "body": Reply({}, [TensorData("int32", (1025,), bytes(4100))])}
    async with linked(lambda call: sizes.get(call.method) or echo(call), limits=limits) as (server, client):
        for reply in sizes.values():
            with pytest.raises(PayloadTooLargeError, match="over the link's limits"):
                await client.call("echo", reply.meta, reply.tensors, TIMEOUT_S)
        assert server.calls == 0
        for method in sizes:
            with pytest.raises(PayloadTooLargeError, match="over the link's limits"):
                await client.call(method, {}, [], TIMEOUT_S)
        await client.call("echo", {}, [TensorData("int32", (1024,), bytes(4096))], TIMEOUT_S)
        assert client.in_flight == 0


async def test_calls_beyond_the_limit_are_refused() -> None:
    async with linked(never, limits=LinkLimits(max_streams=2)) as (server, client):
        running = [asyncio.create_task(client.call("m", {}, [], TIMEOUT_S)) for _ in range(2)]
        await eventually(lambda: server.statistics().streams == 2)
        with pytest.raises(OverloadedError) as raised:
            await client.call("m", {}, [], TIMEOUT_S)
        assert raised.value.retry_after_s == 1.0
        for call in running:
            call.cancel()
        await asyncio.gather(*running, return_exceptions=True)


# Endings


async def test_draining_refuses_new_calls_and_finishes_old_ones() -> None:
    gate = asyncio.Event()

    async def handler(call: Call) -> Reply:
        await gate.wait()
        return Reply({"done": True})

    async with linked(handler) as (server, client):
        running = asyncio.create_task(client.call("m", {}, [], TIMEOUT_S))
        await eventually(lambda: server.calls == 1)
        told = asyncio.Event()
        client.on_credits = told.set
        server.drain()
        await within_patience(told.wait())
        assert client.draining
        with pytest.raises(UnavailableError):
            await client.call("m", {}, [], TIMEOUT_S)
        with pytest.raises(UnavailableError):
            await anext(client.stream("m", {}, [], TIMEOUT_S))
        late = await LinkClient.connect(server.addresses[0], SECRET)
        await eventually(lambda: late.draining)
        gate.set()
        assert (await running).meta == {"done": True}
        await late.close()


async def end_by_server(server: Any, client: LinkClient) -> None:
    await server.close()


async def end_by_client(server: Any, client: LinkClient) -> None:
    await client.close()


@pytest.mark.parametrize("end", [end_by_server, end_by_client])
async def test_when_a_link_ends_all_in_flight_fails_at_once(
    end: Callable[..., Awaitable[None]], transport: Transport
) -> None:
    ended: list[str] = []

    async def call(_: Call) -> Reply:
        try:
            return await never(_)
        finally:
            ended.append("call")

    async def stream(_: Call) -> AsyncIterator[Reply]:
        try:
            yield Reply({"n": 0})
            await never(_)
        finally:
            ended.append("stream")

    handlers: dict[str, Any] = {"call": call, "stream": stream}
    async with linked(lambda call: handlers[call.method](call), transport) as (server, client):
        lost = asyncio.Event()
        client.on_closed = lost.set
        calls = [asyncio.create_task(client.call("call", {}, [], TIMEOUT_S)) for _ in range(3)]
        items = client.stream("stream", {}, [], TIMEOUT_S)
        await anext(items)
        await eventually(lambda: server.statistics().streams == 4)
        await end(server, client)
        if end is end_by_server:
            assert sorted(ended) == ["call"] * 3 + ["stream"]  # `close` waits for what it cancels
        for one in calls:
            with pytest.raises(LinkClosedError):
                await one
        with pytest.raises(LinkClosedError):
            await anext(items)
        assert lost.is_set()
        assert client.closed
        for again in (client.call("call", {}, [], TIMEOUT_S), anext(client.stream("call", {}, [], TIMEOUT_S))):
            with pytest.raises(LinkClosedError):
                await again
        await eventually(lambda: sorted(ended) == ["call"] * 3 + ["stream"])
        assert server.statistics().streams == 0


async def test_a_server_that_leaves_pings_unanswered_is_given_up() -> None:
    async with scripted_server() as (address, peers):
        limits = LinkLimits(ping_interval_s=TINY_S / 4, ping_timeout_s=TINY_S)
        client = await LinkClient.connect(address, SECRET, limits)
        with pytest.raises(LinkClosedError, match="silent"):
            await client.call("m", {}, [], TIMEOUT_S)
        assert peers[0].of(Kind.PING)


async def test_only_silence_counts_against_a_server() -> None:
    async with linked(echo, limits=LinkLimits(ping_interval_s=0.001)) as (_, client):
        received = client.received
        await eventually(lambda: client.received > received + 5)  # the answers to its pings
        client._ping_timer.cancel()  # type: ignore[union-attr]
        await client.call("m", {}, [], TIMEOUT_S)
        client._silent_since -= 1000.0
        client._ping()  # something came since the last one
        await turns()
        assert not client.closed
        client._ping_timer.cancel()  # type: ignore[union-attr]
        client._received_before, client._silent_since = client.received, client._silent_since - 1000.0
        client._ping()  # nothing did
        await eventually(lambda: client.closed)


# Back-pressure


def server_side(server: Any) -> Any:
    (peer,) = server._peers
    return peer.connection


async def turns(count: int = 200) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_stream_waits_for_a_peer_that_does_not_read(transport: Transport) -> None:
    produced = 0

    async def handler(call: Call) -> AsyncIterator[Reply]:
        nonlocal produced
        while True:
            produced += 1
            yield Reply({}, [TensorData("int32", (65536,), bytes(2**18))])

    limits = LinkLimits(write_buffer_bytes=2**20)
    async with serving(handler, transport, limits=limits) as server:
        peer = await Peer.connect(server.addresses[0])
        peer.stop_reading()
        peer.send(Kind.REQUEST, 1, {"m": "m", "s": TIMEOUT_S})
        await eventually(lambda: not server_side(server).writable)
        before = produced
        await turns()
        assert produced == before
        await peer.close()
        await eventually(lambda: server.statistics().connections == 0)


async def test_a_server_stops_reading_a_peer_that_does_not_read(transport: Transport) -> None:
    def handler(call: Call) -> Reply:
        return Reply({}, [TensorData("int32", (16384,), bytes(2**16))])

    limits = LinkLimits(write_buffer_bytes=2**18)
    async with serving(handler, transport, limits=limits) as server:
        peer = await Peer.connect(server.addresses[0])
        peer.stop_reading()
        stream = 0
        while server.calls < 10**5 and peer.connection.writable:  # its requests back up: the server reads no more
            for _ in range(100):
                stream += 1
                peer.send(Kind.REQUEST, stream, {"m": "m", "s": TIMEOUT_S, "h": {"x": "y" * 2000}})
            await asyncio.sleep(0)
        assert not peer.connection.writable
        before = server.calls
        await turns()
        assert server.calls == before
        await peer.close()
        await eventually(lambda: server.statistics().connections == 0)


async def test_after_a_pause_everything_goes_on() -> None:
    limits = LinkLimits(write_buffer_bytes=2**16)
    async with serving(echo, limits=limits) as server:
        peer = await Peer.connect(server.addresses[0])
        peer.connection.lift_limits()
        peer.stop_reading()
        for stream in range(300):
            peer.send(
                Kind.REQUEST, stream, {"m": "m", "s": TIMEOUT_S}, [TensorData("int32", (8192,), bytes(2**15))]
            )
        await eventually(lambda: not server_side(server).writable)
        assert peer.connection._transport is not None
        peer.connection._transport.resume_reading()
        await eventually(lambda: len(peer.of(Kind.RESPONSE)) == 300)
        assert [frame.stream for frame in peer.of(Kind.RESPONSE)] == list(range(300))
        await peer.close()


async def test_a_call_to_a_server_that_does_not_read_ends_at_its_deadline() -> None:
    def deaf(peer: Peer, frame: Frame) -> None:
        welcome(peer, frame)
        if frame.kind is Kind.REQUEST:
            peer.stop_reading()

    async with scripted_server(deaf) as (address, peers):
        client = await LinkClient.connect(address, SECRET, LinkLimits(write_buffer_bytes=2**16))
        large = [TensorData("int32", (2**21,), bytes(2**23))]
        with pytest.raises(DeadlineExceededError):  # makes it deaf
            await client.call("m", {}, [], TINY_S)
        with pytest.raises(DeadlineExceededError, match="was not answered"):  # fills the buffers
            await client.call("m", {}, large, TINY_S)
        for attempt in (client.call("m", {}, large, TINY_S), anext(client.stream("m", {}, large, TINY_S))):
            with pytest.raises(DeadlineExceededError, match="could not be sent"):
                await attempt
        assert client.in_flight == 0
        assert len(peers[0].of(Kind.REQUEST)) == 1
        await client.close()


async def test_many_senders_that_wait_do_not_all_go_on_at_once() -> None:
    def one_at_a_time(peer: Peer, frame: Frame) -> None:
        welcome(peer, frame)
        if frame.kind is Kind.REQUEST:
            peer.stop_reading()

    async with scripted_server(one_at_a_time) as (address, peers):
        client = await LinkClient.connect(address, SECRET, LinkLimits(write_buffer_bytes=2**16))
        large = [TensorData("int32", (2**20,), bytes(2**22))]
        calls = [asyncio.create_task(client.call("m", {}, large, TIMEOUT_S)) for _ in range(16)]
        await eventually(lambda: peers[0].of(Kind.REQUEST))
        await eventually(lambda: client.in_flight == 2)
        await turns()
        assert client.in_flight == 2  # one was read; the next fills the buffer for all others
        await client.close()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, LinkClosedError)
