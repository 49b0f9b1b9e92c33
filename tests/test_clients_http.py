"""`AsyncClient` over sockets: what breaks there, and what is kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import aiohttp
import msgpack
import numpy as np
import pytest
from aiohttp import web
from pimoe.clients import (
    AiohttpTransport,
    AsyncClient,
    ConnectionFailed,
    DeadlineExceededError,
    Limits,
    OverloadedError,
    PayloadTooLargeError,
    ProtocolError,
    RetryPolicy,
)
from scripted_server import ScriptedServer, Seen, abort, scripted_server
from scripted_transport import completion, ones, sse, tensor

QUICK = RetryPolicy(base_delay_s=0.001)
PART = sse(completion("a", finish_reason=None), done=False)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, model="m", retries=QUICK) as running:
        yield running


async def echo(request: web.Request) -> web.Response:
    sent = msgpack.unpackb(await request.read())["inputs"][0]
    return web.Response(body=msgpack.packb({"outputs": [{**sent, "name": "output"}]}))


async def begin(request: web.Request, *pieces: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
    return response


@pytest.mark.parametrize("tokens", [1, 1000, 4_000])
async def test_arrays_small_and_large(server: ScriptedServer, client: AsyncClient, tokens: int) -> None:
    server.handler = echo
    array = np.random.default_rng(0).normal(size=(tokens, 256)).astype(np.float32)
    assert np.array_equal(await client.infer(array), array)


async def test_connections_are_used_again(server: ScriptedServer, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/infer"):
            return await echo(request)
        return await begin(request, PART, sse(completion("b")))

    server.handler = answer
    await client.infer(ones())
    assert [chunk.text async for chunk in client.stream("x")] == ["a", "b"]
    await client.infer(ones())
    assert len(set(server.peers)) == 1, "streams that were read to their end included"


async def test_connections_are_bounded(server: ScriptedServer) -> None:
    server.handler = echo
    async with AsyncClient(server.url, model="m", limits=Limits(max_connections=2)) as client:
        await asyncio.gather(*(client.infer(ones()) for _ in range(20)))
    assert len(set(server.peers)) <= 2


async def test_429_then_200(server: ScriptedServer, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.Response:
        if len(server.peers) < 3:
            return web.Response(status=429, headers={"Retry-After": "0", "retry-after-ms": "1"})
        return await echo(request)

    server.handler = answer
    assert np.array_equal(await client.infer(ones()), ones())
    assert len(server.peers) == 3


async def test_429_for_good(server: ScriptedServer) -> None:
    async def answer(request: web.Request) -> web.Response:
        error = {"message": "full", "type": "rate_limit_error", "param": None, "code": "overloaded"}
        return web.json_response({"error": error}, status=429, headers={"Retry-After": "7", "x-request-id": "r1"})

    server.handler = answer
    async with AsyncClient(server.url, model="m", retries=0) as client:
        with pytest.raises(OverloadedError) as caught:
            await client.generate("x")
    error = caught.value
    assert (error.message, error.status, error.retry_after_s, error.request_id) == ("full", 429, 7.0, "r1")


async def test_a_reset_before_the_answer_is_tried_again(server: ScriptedServer, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        if len(server.peers) == 1:
            abort(request)
        return await echo(request)

    server.handler = answer
    assert np.array_equal(await client.infer(ones()), ones())
    assert len(server.peers) == 2


async def test_an_answer_cut_in_the_middle_is_tried_again(server: ScriptedServer, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if len(server.peers) > 1:
            return await echo(request)
        response = await begin(request, b"half of it")
        abort(request)
        return response

    server.handler = answer
    assert np.array_equal(await client.infer(ones()), ones())


async def test_resets_for_good(server: ScriptedServer, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.Response:
        abort(request)
        return web.Response()

    server.handler = answer
    with pytest.raises(ConnectionFailed, match="broke") as caught:
        await client.infer(ones())
    assert caught.value.__notes__ == ["given up after 4 retries"]
    assert len(server.peers) == 5


async def test_a_stream_that_is_reset(server: ScriptedServer, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin(request, PART)
        await got.waited()
        abort(request)
        return response

    got = Seen()
    server.handler = answer
    stream = client.stream("x")
    assert (await anext(stream)).text == "a"
    got.set()
    with pytest.raises(ConnectionFailed, match="broke"):
        await anext(stream)
    assert stream.generation.text == "a"
    assert len(server.peers) == 1


async def test_a_stream_that_ends_without_its_end(server: ScriptedServer, client: AsyncClient) -> None:
    server.handler = lambda request: begin(request, PART)
    with pytest.raises(ConnectionFailed, match="cut after 1 events"):
        async for _ in client.stream("x"):
            pass


async def test_an_error_in_a_stream(server: ScriptedServer, client: AsyncClient) -> None:
    event = {"error": {"message": "late", "type": "timeout_error", "param": None, "code": "deadline_exceeded"}}
    server.handler = lambda request: begin(request, PART, sse(event, done=False))
    with pytest.raises(DeadlineExceededError, match="late"):
        async for _ in client.stream("x"):
            pass


class Endless:
    """A handler that never ends by itself, and what it saw."""

    def __init__(self, *pieces: bytes, streams: bool = True) -> None:
        self.began, self.left = Seen(), Seen()
        self._pieces, self._streams = pieces, streams

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        if self._streams:
            await begin(request, *self._pieces)
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError("unreachable")


async def test_leaving_a_stream_is_seen_by_the_server(server: ScriptedServer, client: AsyncClient) -> None:
    server.handler = endless = Endless(PART)
    async with client.stream("x") as chunks:
        await anext(chunks)
    await endless.left.waited()


async def test_dropping_a_stream_is_seen_by_the_server(server: ScriptedServer, client: AsyncClient) -> None:
    server.handler = endless = Endless(PART)
    async for chunk in client.stream("x"):
        assert chunk.text == "a"
        break
    await endless.left.waited()


@pytest.mark.parametrize("streams", [True, False])
async def test_cancelling_a_task_is_seen_by_the_server(
    server: ScriptedServer, client: AsyncClient, streams: bool
) -> None:
    server.handler = endless = Endless(streams=streams)
    task = asyncio.create_task(anext(client.stream("x")) if streams else client.generate("x"))
    await endless.began.waited()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await endless.left.waited()


@pytest.mark.parametrize("streams", [True, False])
async def test_a_server_that_does_not_answer_in_time(server: ScriptedServer, streams: bool) -> None:
    server.handler = endless = Endless(streams=streams)
    async with AsyncClient(server.url, model="m", limits=Limits(grace_s=0)) as client:
        call = anext(client.stream("x", timeout_s=0.5)) if streams else client.generate("x", timeout_s=0.5)
        with pytest.raises(DeadlineExceededError, match=r"within 0\.5 s"):
            await call
        await endless.left.waited()


async def test_refused_while_the_body_is_still_on_its_way(server: ScriptedServer, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.Response:
        connections.append(request.transport)
        problem = {"title": "Content Too Large", "detail": "too large", "code": "payload_too_large"}
        return web.json_response(problem, status=413, content_type="application/problem+json")

    connections: list[asyncio.Transport | None] = []
    server.handler = answer
    with pytest.raises(PayloadTooLargeError, match="too large"):
        await client.infer(np.ones((8_000, 256), np.float32))
    # Or the next test would find a socket half sent. The event is in another thread.
    while connections[0] and not connections[0].is_closing():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        async with AsyncClient(url, retries=QUICK) as client:
            with pytest.raises(ConnectionFailed, match=f"nothing listens at {url}; start it with `pimoe serve`"):
                await client.generate("x")
            assert not await client.health()


async def test_a_host_that_is_not_known() -> None:
    async with AsyncClient("http://nowhere.invalid", retries=0, model="m") as client:
        with pytest.raises(ConnectionFailed, match=r"nowhere\.invalid"):
            await client.generate("x")


async def test_something_that_is_not_http() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        async with AsyncClient(f"http://127.0.0.1:{port}", model="m", retries=0) as client:
            with pytest.raises(ProtocolError, match="does not answer in HTTP"):
                await client.generate("x")


async def test_an_own_session_is_used_and_left_open(server: ScriptedServer) -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.headers["x-session"] == "own"
        return await echo(request)

    server.handler = answer
    async with aiohttp.ClientSession(headers={"x-session": "own"}) as session:
        transport = AiohttpTransport(server.url, session=session)
        async with AsyncClient(server.url, model="m", transport=transport) as client:
            await client.infer(ones())
        assert not session.closed


def test_a_client_stays_with_its_loop(server: ScriptedServer) -> None:
    async def ask() -> None:
        await own.infer(ones())

    server.handler = echo
    own = AsyncClient(server.url, model="m")
    with asyncio.Runner() as first:
        first.run(ask())
        with asyncio.Runner() as second, pytest.raises(RuntimeError, match="event loop of its first call"):
            second.run(ask())
        first.run(own.close())


async def test_a_prefix_in_the_address(server: ScriptedServer) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=msgpack.packb(tensor(ones() * (request.raw_path == "/p/v2/models/a%2Fb/infer"))))

    server.handler = answer
    async with AsyncClient(server.url + "/p/", model="a/b") as client:
        assert (await client.infer(ones()))[0, 0] == 1
