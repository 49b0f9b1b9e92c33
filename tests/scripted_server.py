"""A real HTTP server in a thread, for tests of `pimoe.clients` over sockets: each test writes its handler."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

WAIT_S = 30.0  # only a test that fails waits this long


class Seen:
    """Something that happens on the server and that a test waits for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.set = self._event.set

    def wait(self) -> None:
        """Blocks until it has happened."""
        assert self._event.wait(WAIT_S), "it did not happen"

    async def waited(self) -> None:
        """Waits without blocking the loop."""
        await asyncio.to_thread(self.wait)


class ScriptedServer:
    """Answers with `handler`; `peers` has the client's address and port of each request."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.handler: Handler | None = None
        self.peers: list[tuple[str, int]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        assert self.handler is not None
        self.peers.append(request.transport.get_extra_info("peername"))
        return await self.handler(request)


def abort(request: web.Request) -> None:
    """Resets the connection of `request`, as the death of a server does."""
    assert request.transport is not None
    request.transport.abort()


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A server on a free loopback port."""
    loop = asyncio.new_event_loop()
    server = ScriptedServer("")

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", server.answer)
        # With handler_cancellation a handler learns that its client has left.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0, lingering_time=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()
