"""A generation while it is made. Leaving it early closes the connection, which cancels it on the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

from .calls import Deadline
from .errors import ConnectionFailed
from .generation import Generation, GenerationBuilder, GenerationChunk
from .settings import Limits
from .sse import SseParser
from .transport import HttpResponse

_DONE = b"[DONE]"
# The end of the body follows [DONE] at once; waiting for it lets the connection be used again.
_END_TIMEOUT_S = 1.0


class EventSource:
    """The events of one answer, each within the call's deadline and the limit on silence."""

    def __init__(self, response: HttpResponse, deadline: Deadline, limits: Limits) -> None:
        self.response = response
        self._deadline = deadline
        self._limits = limits
        self._parser = SseParser(limits.max_event_bytes)
        self._ready: deque[bytes] = deque()
        self._received = 0

    async def next(self) -> bytes | None:
        """The next event's data; None when the server says that there are no more.

        Raises:
            ConnectionFailed: the stream ended before that.
            DeadlineExceededError: time ran out.
        """
        while not self._ready:
            piece = await self._read()
            if not piece:
                raise ConnectionFailed(f"the stream was cut after {self._received} events, before its end")
            self._ready.extend(self._parser.feed(piece))
        event = self._ready.popleft()
        self._received += 1
        return None if event == _DONE else event

    async def _read(self) -> bytes:
        remaining = self._deadline.remaining_s() + self._limits.grace_s
        # Before the first event the request may rightly wait in the server's queue, for all of its time.
        idle = self._limits.idle_timeout_s if self._received else remaining
        try:
            async with asyncio.timeout(min(remaining, idle)):
                return await self.response.read_some()
        except TimeoutError:
            if idle < remaining:
                raise ConnectionFailed(f"the stream was silent for {idle:g} s") from None
            raise self._deadline.exceeded(f"the stream did not end ({self._received} events came)") from None

    async def finish(self) -> None:
        """Reads to the end of the body after the last event, so that the connection can be used again."""
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                while await self.response.read_some():
                    pass
        except (TimeoutError, ConnectionFailed):
            pass  # the answer is whole; all that is lost is one connection
        finally:
            self.response.close()


class AsyncGenerationStream(AsyncIterator[GenerationChunk]):
    """Chunks as they are generated. The request is sent when the first is asked for, or by `async with`.

    `async with` closes it at the end of the block. A stream that is simply dropped, as by `break`, is closed
    when Python lets go of it.
    """

    def __init__(self, open_source: Callable[[], Awaitable[EventSource]]) -> None:
        self._open_source = open_source
        self._source: EventSource | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._builder = GenerationBuilder()
        self._ended = False

    @property
    def generation(self) -> Generation:
        """All that has come so far; whole when the iteration has ended by itself."""
        return self._builder.build()

    async def __anext__(self) -> GenerationChunk:
        while not self._ended:
            try:
                chunk = await self._next()
            except BaseException:  # a cancelled reader too must cancel the generation
                self.abort()
                raise
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def _next(self) -> GenerationChunk | None:
        source = self._source or await self._open()
        event = await source.next()
        if event is not None:
            return self._builder.add(event)
        if self._builder.finish_reason is None:
            raise ConnectionFailed("the stream ended without a finish reason")
        self._ended = True
        await source.finish()
        return None

    async def _open(self) -> EventSource:
        self._loop = asyncio.get_running_loop()
        self._source = source = await self._open_source()
        self._builder.cache = source.response.headers.get("x-pimoe-cache")
        self._builder.request_id = source.response.headers.get("x-request-id")
        return source

    async def aclose(self) -> None:
        """Ends the stream; the server stops generating. Harmless when it has ended."""
        self.abort()

    def abort(self) -> None:
        """`aclose` without waiting, for the thread of the event loop only."""
        self._ended = True
        if self._source is not None:
            self._source.response.close()

    async def __aenter__(self) -> Self:
        if self._source is None and not self._ended:
            await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        # May run in any thread, and connections belong to that of their loop.
        if not self._ended and self._source is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its connections with it
                self._loop.call_soon_threadsafe(self._source.response.close)

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open" if self._source else "not sent yet"
        return f"<{type(self).__name__} {state}, {len(self.generation.token_ids)} tokens>"
