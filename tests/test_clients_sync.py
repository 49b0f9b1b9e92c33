"""`Client`: the same client from threads, from inside a loop, and after its end."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from aiohttp import web
from pimoe.clients import Client, ConnectionFailed, HttpRequest
from pimoe.clients.loop_thread import LoopThread
from scripted_server import ScriptedServer, Seen, scripted_server
from scripted_transport import Reply, ScriptedTransport, completion, json_reply, msgpack_reply, ones, sse, tensor

PART = sse(completion("a", finish_reason=None), done=False)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        running.handler = answer
        yield running


async def answer(request: web.Request) -> web.StreamResponse:
    if request.path.endswith("/infer"):
        sent = msgpack.unpackb(await request.read())["inputs"][0]
        return web.Response(body=msgpack.packb({"outputs": [{**sent, "name": "output"}]}))
    return web.json_response(completion("hello"))


class Endless:
    """A stream that never ends by itself, and whether its reader left."""

    def __init__(self) -> None:
        self.began, self.left = Seen(), Seen()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(PART)
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError("unreachable")


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pimoe-client"]


def test_every_method() -> None:
    replies = [
        json_reply({"data": [{"id": "m"}]}),
        msgpack_reply(tensor(ones() * 2)),
        msgpack_reply({"responses": [tensor(ones())]}),
        json_reply(completion("hello")),
        json_reply(completion("", message={"content": "hi"})),
        Reply(200, {}, [PART, sse(completion("b"))]),
        json_reply({"data": [{"id": "m"}]}),
        json_reply({"model": "m"}),
        json_reply({}),
    ]
    transport = ScriptedTransport(*replies)
    with Client("http://host", transport=transport, timeout_s=5) as client:
        assert client.infer(ones())[0, 0] == 2
        assert client.infer_many([ones()])[0][0, 0] == 1
        assert client.generate("x").text == "hello"
        assert client.chat([{"role": "user", "content": "x"}]).text == "hi"
        stream = client.stream("x")
        assert [chunk.text for chunk in stream] == ["a", "b"]
        assert stream.generation.text == "ab"
        assert list(stream) == []
        assert client.models() == ["m"]
        assert client.status() == {"model": "m"}
        assert client.health()
        assert repr(client) == "Client('http://host', model='m', timeout_s=5)"
        assert repr(stream) == "<GenerationStream ended, 2 tokens>"
    assert transport.closed
    assert client_threads() == []


def test_many_threads_share_one_client(server: ScriptedServer) -> None:
    with Client(server.url, model="m") as client, ThreadPoolExecutor(8) as threads:
        arrays = [ones() * n for n in range(64)]
        outputs = list(threads.map(client.infer, arrays))
        assert len(client_threads()) == 1
    assert all(np.array_equal(output, array) for output, array in zip(outputs, arrays, strict=True))


async def test_inside_a_running_loop(server: ScriptedServer) -> None:
    with Client(server.url, model="m") as client:
        assert client.generate("x").text == "hello"


def test_leaving_a_stream_is_seen_by_the_server(server: ScriptedServer) -> None:
    with Client(server.url, model="m") as client:
        server.handler = endless = Endless()
        with client.stream("x") as chunks:
            assert next(chunks).text == "a"
        endless.left.wait()
        assert list(chunks) == []
        server.handler = endless = Endless()
        for _ in client.stream("x"):
            break
        endless.left.wait()


def test_a_stream_keeps_its_client(server: ScriptedServer) -> None:
    server.handler = Endless()
    stream = Client(server.url, model="m").stream("x")
    gc.collect()
    assert next(stream).text == "a"
    stream.close()


def test_errors_come_through() -> None:
    with (
        Client(transport=ScriptedTransport(ConnectionFailed("no")), model="m", retries=0) as client,
        pytest.raises(ConnectionFailed, match="no"),
    ):
        client.generate("x")


def test_closing_ends_waiting_calls(server: ScriptedServer) -> None:
    server.handler = endless = Endless()
    client = Client(server.url, model="m")
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            client.generate("x")
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    endless.began.wait()
    client.close()
    thread.join(30)
    assert "closed while this call waited" in str(failures[0])
    endless.left.wait()


def test_a_closed_client_says_so() -> None:
    client = Client(transport=ScriptedTransport(json_reply(completion()), Reply(200, {}, [PART])), model="m")
    client.generate("x")
    stream = client.stream("x")
    next(stream)
    client.close()
    client.close()
    for call in (lambda: client.generate("x"), lambda: next(stream), client.health):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    stream.close()
    with Client() as unused:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        unused.health()


def test_a_dropped_client_ends_its_thread(server: ScriptedServer) -> None:
    client = Client(server.url, model="m")
    client.generate("x")
    threads = client_threads()
    del client
    gc.collect()
    for thread in threads:
        thread.join(30)
    assert client_threads() == []


def test_an_interrupt_cancels_the_call(server: ScriptedServer) -> None:
    server.handler = endless = Endless()

    def interrupt() -> None:
        endless.began.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with Client(server.url, model="m") as client:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.generate("x")
        endless.left.wait()
        server.handler = answer
        assert client.generate("x").text == "hello", "the client goes on"
    thread.join()


def test_its_own_thread_cannot_wait_for_itself() -> None:
    def handler(request: HttpRequest) -> Reply:
        client.health()
        raise AssertionError("unreachable")

    with (
        Client(transport=ScriptedTransport(handler=handler), model="m") as client,
        pytest.raises(RuntimeError, match="wait for itself"),
    ):
        client.generate("x")


def test_a_refused_coroutine_is_closed() -> None:
    thread = LoopThread("test")

    async def nothing() -> None: ...

    async def last() -> None: ...

    thread.close(last)
    coroutine = nothing()
    with pytest.raises(RuntimeError, match="closed"):
        thread.run(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED, (
        "or Python would warn that it was never awaited"
    )


def run_script(script: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "error::ResourceWarning",
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        script,
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ})


UNCLOSED = """
import sys
from pimoe.clients import Client

client = Client(sys.argv[1], model="m")
print(client.generate("x").text)
"""


def test_a_program_need_not_close_its_client(server: ScriptedServer) -> None:
    done = run_script(UNCLOSED, server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


FORK = """
import os, sys
from pimoe.clients import Client

used, unused = (Client(sys.argv[1], model="m") for _ in range(2))
used.generate("x")
child = os.fork()
if child == 0:
    try:
        used.generate("x")
    except RuntimeError as error:
        print(error)
    print(unused.generate("x").text)
    sys.stdout.flush()
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
print(used.generate("x").text)
"""


def test_forked_children_are_told_rather_than_stuck(server: ScriptedServer) -> None:
    done = run_script(FORK, server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "this client was used before the process forked: make a new one in the child",
        "hello",
        "hello",
    ]
