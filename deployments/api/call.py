"""One HTTP request: its headers, id, body, lifetime, and the answer in the shape that its path asks for."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from ...runtime.caching import held_bytes
from ...runtime.errors import PimoeError
from ...runtime.requests import CacheOutcome
from . import errors
from .bodies import check_headers, read_body
from .context import ApiSettings, GatewayContext
from .errors import Headers, MethodNotAllowedError
from .fields import shown
from .inference_codec import KnownHeads
from .known_answers import Asked, KnownAnswer
from .lifetime import Lifetime, cancelled_from_behind
from .options import CallOptions, HeaderOptions, read_headers

logger = logging.getLogger(__name__)

_MAX_REQUEST_ID_CHARS = 128
_JSON = b"application/json"
_OPENAI_PATHS = frozenset(("/v1", "/tokenize", "/detokenize"))
# A client that does not read cannot be told of an error; do not wait for it longer than this.
_LAST_WORDS_S = 1.0

# An id must be unique, and need not be a secret: what the system draws once, and a count.
_DRAWN = secrets.token_hex(8)
_count = itertools.count(int.from_bytes(os.urandom(4), "little"))


def new_id() -> str:
    """32 hexadecimal digits that no other request has, in this process or another."""
    return f"{_DRAWN}{next(_count):016x}"


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The caller's `x-request-id` if it is short, visible ASCII, else a new one. It goes into headers and
    logs."""
    given = headers.get(b"x-request-id")
    if given and len(given) <= _MAX_REQUEST_ID_CHARS and given.isascii():
        text = given.decode("ascii")
        if text.isprintable() and " " not in text:
            return text
    return new_id()


def is_openai(scope: Scope) -> bool:
    """Whether errors of the path have OpenAI's shape: under `/v1`, and where vLLM has routes beside it."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.startswith("/v1/") or path in _OPENAI_PATHS


class Kept(NamedTuple):
    """What an endpoint remembers of one request for the next."""

    options: HeaderOptions
    heads: KnownHeads


class Call:
    """What a handler gets."""

    __slots__ = (
        "_asked",
        "_read",
        "_send",
        "context",
        "headers",
        "kept",
        "lifetime",
        "receive",
        "request_id",
        "scope",
        "started",
        "streams",
    )

    def __init__(self, context: GatewayContext, kept: Kept, scope: Scope, receive: Receive, send: Send) -> None:
        self.context = context
        self.kept = kept
        self.scope = scope
        self.receive = receive
        self._send = send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._read = read_headers(scope["headers"])
        self.request_id = request_id_of(self.headers)
        self.lifetime = Lifetime(context.settings.default_timeout_s)
        self.started = False
        self.streams = False
        self._asked: Asked | None = None

    @property
    def settings(self) -> ApiSettings:
        """The limits in force."""
        return self.context.settings

    def work_id(self) -> str:
        """An id for work behind the gateway. The caller's own id is part of it, but need not be unique."""
        return f"{self.request_id[:64]}-{_DRAWN[:8]}{next(_count) & 0xFFFFFFFF:08x}"

    def header_options(self) -> CallOptions:
        """The options that the headers give.

        Raises:
            InvalidRequestError.
        """
        return self.kept.options.read(self._read)

    async def body(self) -> bytes:
        """The body; from then on the client's disconnect ends the call.

        Raises:
            PayloadTooLargeError, UnsupportedMediaTypeError, InvalidRequestError, RequestCancelledError.
        """
        check_headers(self.headers, self.settings.max_body_bytes)
        body = await read_body(self.receive, self.settings.max_body_bytes)
        self.lifetime.watch(self.receive)
        return body

    def start_clock(self, timeout_s: float) -> float:
        """Bounds the call by its own timeout, counted from its arrival; gives what remains for the backend.

        Raises:
            DeadlineExceededError: nothing remains.
        """
        return self.lifetime.limit(timeout_s, self.settings.deadline_grace_s)

    async def repeat(self, body: bytes) -> bool:
        """Answers as before where this very request was answered from the cache, and would be now.

        Returns:
            Whether it was.
        """
        known = self.context.known
        if known is None:
            return False
        self._asked = (self.scope["path"], self._read, body)
        if (answer := known.find(self._asked)) is None:
            return False
        if not self.context.recall(answer.hits):
            known.drop(self._asked)
            return False
        await self._start(200, [*answer.headers])
        await self._send({"type": "http.response.body", "body": answer.body})
        return True

    async def respond_hit(
        self, body: bytes, content_type: bytes, extra: Iterable[tuple[bytes, bytes]], hits: Sequence[object]
    ) -> None:
        """Sends a whole answer made of hits of the cache, and keeps it for `repeat`. Only one that follows from
        the request and the hits alone: not from the time of day, or chance."""
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *extra]
        if self.context.known is not None and self._asked is not None:
            self.context.known.put(self._asked, KnownAnswer([*headers], body, hits, held_bytes(hits)))
        await self._start(200, headers)
        await self._send({"type": "http.response.body", "body": body})

    async def respond(
        self,
        body: bytes,
        content_type: bytes = _JSON,
        status: int = 200,
        extra: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """Sends a whole answer."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [(b"content-type", content_type), length, *extra])
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, extra: Iterable[tuple[bytes, bytes]]) -> None:
        """Sends the head of an SSE answer, with `extra` headers."""
        self.streams = True
        head: Headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # Reverse proxies of nginx's kind would otherwise collect the events.
            (b"x-accel-buffering", b"no"),
            *extra,
        ]
        await self._start(200, head)

    async def event(self, data: bytes) -> None:
        """Sends one SSE event."""
        body = b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end_stream(self) -> None:
        """Sends the end of an SSE answer."""
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: Exception, extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Answers with an error, or, in the middle of a stream, ends it with one."""
        public = self._log(error)
        if not self.started:
            status, body, content_type, headers = errors.render(public, is_openai(self.scope))
            await self.respond(body, content_type, status, (*headers, *extra))
        elif self.streams:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self.event(errors.render(public, openai=True)[1])
                    await self.end_stream()

    def _log(self, error: Exception) -> PimoeError:
        public = errors.public(error, self.request_id)
        if errors.is_fault(error):
            logger.error("request %s failed", self.request_id, exc_info=error)
        elif public is not error:
            logger.warning("request %s failed: %s", self.request_id, error)
        return public

    async def _start(self, status: int, headers: Headers) -> None:
        self.started = True
        headers.append((b"x-request-id", self.request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def cache_header(outcome: CacheOutcome) -> tuple[bytes, bytes]:
    """The response header that says what the cache did."""
    return b"x-pimoe-cache", outcome.encode()


def combined(outcomes: Iterable[CacheOutcome]) -> CacheOutcome:
    """One outcome for an answer of several parts: the one that cost most; of none, a bypass."""
    found = set(outcomes)
    order: tuple[CacheOutcome, ...] = ("bypass", "miss", "coalesced", "hit")
    return next((outcome for outcome in order if outcome in found), "bypass")


Handler = Callable[[Call], Awaitable[None]]


class Endpoint:
    """A handler as an ASGI application: methods, lifetime, and every error in one place."""

    def __init__(self, context: GatewayContext, handler: Handler, methods: tuple[str, ...]) -> None:
        self._context = context
        self._kept = Kept(HeaderOptions(context.settings), KnownHeads())
        self._handler = handler
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(self._context, self._kept, scope, receive, send)
        if scope["method"] not in self._methods:
            await self._refuse_method(call)
            return
        try:
            async with call.lifetime:
                await self._handler(call)
        except asyncio.CancelledError:
            if not cancelled_from_behind():
                raise
            # This request was not cancelled, so it still gets its one answer.
            await call.fail(PimoeError("the work behind the request was cancelled"))
        except Exception as error:
            await call.fail(error)
            errors.forget_frames(error)

    async def _refuse_method(self, call: Call) -> None:
        allowed = ", ".join(self._methods)
        error = MethodNotAllowedError(f"{shown(call.scope['method'])} is not allowed here; use {allowed}")
        await call.fail(error, [(b"allow", allowed.encode())])
