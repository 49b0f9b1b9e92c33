"""The calling end of one link: any number of calls and streams at once over one socket."""

from __future__ import annotations

import asyncio
import ssl as tls
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

from ..errors import (
    DeadlineExceededError,
    LinkAuthenticationError,
    LinkClosedError,
    LinkError,
    LinkProtocolError,
    OverloadedError,
    PimoeError,
    UnavailableError,
    from_wire,
)
from ..requests import TensorData
from .addresses import split_tcp
from .authentication import new_nonce, prove, verify
from .connection import LinkConnection, LinkLimits
from .frames import Frame, Kind, pack_call
from .messages import Packed, Reply
from .pending import Answered, PendingCalls, settle, settle_packed
from .shared_memory import Offer, offer

_STREAM_IDS = 2**32


class LinkClient:
    """Made by `connect`. Every call has a deadline, sent as remaining time and enforced on this end too.

    Attributes:
        credits: how many calls the server lets this client keep in flight (None: no limit). Holding to it is
            the caller's part (`LinkPool` does), since only the caller can choose another replica instead.
        draining: the server asked for new calls to go elsewhere.
    """

    def __init__(self, address: str, secret: bytes, limits: LinkLimits | None = None) -> None:
        self.address = address
        self.credits: int | None = None
        self.draining = False
        self.on_closed: Callable[[], None] = lambda: None
        self.on_credits: Callable[[], None] = lambda: None
        self._secret = secret
        self._limits = limits or LinkLimits()
        self._loop = asyncio.get_running_loop()
        self._nonce = new_nonce()
        self._server_nonce: bytes | None = None
        self._offer: Offer | None = None
        self._welcomed: asyncio.Future[None] = self._loop.create_future()
        # A link that is lost while `connect` is cancelled leaves nobody to look at the reason.
        self._welcomed.add_done_callback(lambda welcomed: welcomed.cancelled() or welcomed.exception())
        self._calls = PendingCalls(self._loop, self._cancel)
        self._streams: dict[int, asyncio.Queue[Reply | PimoeError | None]] = {}
        self._next_stream = 1
        self._ping_timer: asyncio.TimerHandle | None = None
        self._silent_since = self._loop.time()
        self._received_before = 0
        self._connection = LinkConnection(self._limits, lambda _: None, self._received, self._lost)

    @classmethod
    async def connect(
        cls,
        address: str,
        secret: bytes,
        limits: LinkLimits | None = None,
        ssl: tls.SSLContext | None = None,
    ) -> LinkClient:
        """Connect and authenticate, both ways.

        Raises:
            LinkClosedError: nothing listens there, or it hung up.
            LinkAuthenticationError: one end does not know the other's secret.
        """
        client = cls(address, secret, limits)
        try:
            async with asyncio.timeout(client._limits.handshake_timeout_s):
                await client._open(ssl)
                await client._welcomed
        except BaseException as error:
            client._connection.abort()
            client._withdraw_offer()  # uvloop does not tell of a connection that was cancelled while it was made
            if isinstance(error, OSError | TimeoutError):
                reason = str(error) or "no answer within the handshake's time"
                raise LinkClosedError(f"cannot connect to {address}: {reason}") from error
            raise
        client._schedule_ping()
        return client

    async def _open(self, ssl: tls.SSLContext | None) -> None:
        if self.address.startswith("unix:"):
            await self._loop.create_unix_connection(lambda: self._connection, self.address.removeprefix("unix:"))
        else:
            host, port = split_tcp(self.address)
            await self._loop.create_connection(lambda: self._connection, host, port, ssl=ssl)

    @property
    def closed(self) -> bool:
        """Whether the socket is gone."""
        return self._connection.closed

    @property
    def writable(self) -> bool:
        """Whether a call would be sent at once, and not wait for the server to read."""
        return self._connection.writable

    @property
    def received(self) -> int:
        """How often anything at all came in; unchanged over a time, the server was silent for it."""
        return self._connection.received

    @property
    def in_flight(self) -> int:
        """Calls and streams that were not answered yet."""
        return len(self._calls) + len(self._streams)

    async def call(
        self, method: str, meta: dict[str, Any], tensors: Sequence[TensorData], timeout_s: float
    ) -> Reply:
        """One request, one answer.

        Raises:
            DeadlineExceededError: no answer within `timeout_s`; the server is told to cancel.
            LinkClosedError: the link broke before the answer, which the server may or may not have computed.
            UnavailableError: the server drains.
            PayloadTooLargeError: the request is over the link's limits.
            PimoeError: whatever the handler raised.
        """
        deadline = self._loop.time() + timeout_s
        await self._ready(method, deadline)
        answer: asyncio.Future[Reply] = self._loop.create_future()
        stream = self._new_stream()
        self._calls.add(stream, method, deadline, partial(settle, answer))
        try:
            self._request(stream, method, meta, tensors, deadline)
            return await answer
        finally:
            self.cancel(stream)
            del answer  # its error holds this frame, and so itself, until the garbage is looked through

    async def call_packed(self, method: str, packed: Packed, timeout_s: float) -> Packed:
        """As `call`, with a packed request and answer.

        Raises: as `call`.
        """
        deadline = self._loop.time() + timeout_s
        await self._ready(method, deadline)
        answer: asyncio.Future[Packed] = self._loop.create_future()
        stream = self.send(method, packed, deadline, partial(settle_packed, answer))
        try:
            return await answer
        finally:
            self.cancel(stream)
            del answer  # as in `call`

    def send(self, method: str, packed: Packed, deadline: float, answered: Answered) -> int:
        """Send a packed call at once and return; `answered` is told its answer or error, once, unless the call is
        cancelled before.

        Args:
            deadline: on `loop.time()`.

        Returns:
            What `cancel` takes.

        Raises:
            LinkClosedError, UnavailableError, PayloadTooLargeError: as `call`; it was not sent.
        """
        stream = self._new_stream()
        meta = pack_call(deadline - self._loop.time(), method.encode("ascii"), packed.meta)
        self._connection.send_packed(Kind.PACKED_REQUEST, stream, Packed(meta, packed.body))
        self._calls.add(stream, method, deadline, answered)
        return stream

    def cancel(self, stream: int) -> None:
        """Give a call up, if it was not answered yet: nobody is told, and the server stops."""
        if self._calls.forget(stream):
            self._cancel(stream)

    async def stream(
        self, method: str, meta: dict[str, Any], tensors: Sequence[TensorData], timeout_s: float
    ) -> AsyncGenerator[Reply, None]:
        """One request, a stream of answers. Closing the iterator cancels it on the server.

        Raises: as `call`.
        """
        deadline = self._loop.time() + timeout_s
        await self._ready(method, deadline)
        stream = self._new_stream()
        items: asyncio.Queue[Reply | PimoeError | None] = asyncio.Queue()  # bounded by `_item`
        self._streams[stream] = items
        try:
            self._request(stream, method, meta, tensors, deadline)
            while True:
                item = await _next_item(items, method, deadline)
                if item is None:
                    return
                if isinstance(item, PimoeError):
                    raise item
                yield item
        finally:
            if self._streams.pop(stream, None) is not None:
                self._cancel(stream)

    def abort(self) -> None:
        """Close the link without waiting for its end; calls in flight fail with `LinkClosedError`."""
        self._connection.abort()

    async def close(self) -> None:
        """Close the link; calls in flight fail with `LinkClosedError`."""
        self.abort()
        await self._connection.wait_closed()

    async def _ready(self, method: str, deadline: float) -> None:
        """Wait until the server reads, for as long as the call may take."""
        if not self._loop.time() < deadline:
            raise DeadlineExceededError(f"no time is left for {method}")
        if self._connection.writable:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._connection.drain()
        except TimeoutError:
            raise DeadlineExceededError(f"{method} could not be sent within its time") from None

    def _request(
        self, stream: int, method: str, meta: dict[str, Any], tensors: Sequence[TensorData], deadline: float
    ) -> None:
        header = {"m": method, "s": deadline - self._loop.time(), "h": meta}
        self._connection.send(Kind.REQUEST, stream, header, tensors)

    def _new_stream(self) -> int:
        if self.draining:
            raise UnavailableError("the replica is draining")
        stream = self._next_stream
        self._next_stream = self._next_stream % (_STREAM_IDS - 1) + 1
        return stream

    def _cancel(self, stream: int) -> None:
        if not self.closed:
            self._connection.send(Kind.CANCEL, stream)

    def _received(self, frame: Frame) -> None:
        kind, stream = frame.kind, frame.stream
        if not self._welcomed.done() and kind not in (Kind.HELLO, Kind.WELCOME):
            raise LinkProtocolError(f"a server must not send {kind.name} before it is known")
        if kind is Kind.PACKED_RESPONSE or kind is Kind.RESPONSE or kind is Kind.ERROR:
            self._answered(stream, frame)
        elif kind is Kind.ITEM:
            self._item(stream, Reply(frame.header.get("h") or {}, frame.tensors))
        elif kind is Kind.HELLO:
            self._prove(frame)
        elif kind is Kind.WELCOME:
            self._welcome(frame)
        elif kind is Kind.CREDIT:
            self.credits = frame.header.get("credits")
            self.on_credits()
        elif kind is Kind.GOAWAY:
            self.draining = True
            self.on_credits()
        elif kind is not Kind.PONG:
            raise LinkProtocolError(f"a server must not send {kind.name}")

    def _answered(self, stream: int, frame: Frame) -> None:
        error = from_wire(frame.header) if frame.kind is Kind.ERROR else None
        if stream in self._streams:
            self._streams.pop(stream).put_nowait(error)
        else:
            self._calls.answer(stream, error or frame.packed or Reply(frame.header.get("h") or {}, frame.tensors))

    def _item(self, stream: int, reply: Reply) -> None:
        if (items := self._streams.get(stream)) is None:
            return  # cancelled here; what was under way still arrives
        if items.qsize() >= self._limits.max_stream_items:
            # One reader that stalls must not stop the others on this socket: its stream ends.
            items.put_nowait(OverloadedError("the reader of a stream fell too far behind"))
            del self._streams[stream]
            self._cancel(stream)
        else:
            items.put_nowait(reply)

    def _prove(self, frame: Frame) -> None:
        server_nonce = frame.header.get("nonce")
        if not isinstance(server_nonce, bytes) or self._server_nonce is not None:
            raise LinkProtocolError("the server's greeting has no nonce, or is its second")
        self._server_nonce = server_nonce
        proof = prove(self._secret, b"client", self._nonce, server_nonce)
        header: dict[str, Any] = {"nonce": self._nonce, "proof": proof}
        if self._connection.is_local and self._limits.shared_memory_bytes:
            self._offer = offer(self._limits.shared_memory_bytes)
        if self._offer is not None:
            header["memory"] = self._offer.described()
        self._connection.send(Kind.PROOF, 0, header)

    def _welcome(self, frame: Frame) -> None:
        proof = frame.header.get("proof")
        nonce = self._server_nonce
        if nonce is None or not verify(self._secret, b"server", nonce, self._nonce, proof):
            raise LinkAuthenticationError(f"{self.address} did not prove the link secret")
        self.credits = frame.header.get("credits")
        self._connection.lift_limits()
        if self._offer is not None and frame.header.get("memory"):
            self._connection.share(self._offer.accepted())
        self._withdraw_offer()
        if not self._welcomed.done():
            self._welcomed.set_result(None)

    def _withdraw_offer(self) -> None:
        if self._offer is not None:
            self._offer.close()
            self._offer = None

    def _lost(self, error: LinkError | None) -> None:
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        self._withdraw_offer()
        reason: LinkError = error or LinkClosedError(f"the link to {self.address} was closed")
        if not self._welcomed.done():
            if self._server_nonce is not None and (error is None or isinstance(error, LinkClosedError)):
                reason = LinkAuthenticationError(f"{self.address} hung up at our proof: another link secret?")
            self._welcomed.set_exception(reason)
        self._calls.fail_all(reason)
        for items in list(self._streams.values()):
            items.put_nowait(reason)
        self._streams.clear()
        self.on_closed()

    def _schedule_ping(self) -> None:
        self._ping_timer = self._loop.call_later(self._limits.ping_interval_s, self._ping)

    def _ping(self) -> None:
        now = self._loop.time()
        if self.received != self._received_before:
            self._received_before = self.received
            self._silent_since = now
        if now - self._silent_since > self._limits.ping_timeout_s:
            self._connection.abort(LinkClosedError(f"{self.address} has been silent for too long"))
            return
        self._connection.send(Kind.PING, 0)
        self._schedule_ping()


async def _next_item(
    items: asyncio.Queue[Reply | PimoeError | None], method: str, deadline: float
) -> Reply | PimoeError | None:
    # A timeout held over a yield of the stream would cancel its reader at work elsewhere: around this wait only.
    try:
        async with asyncio.timeout_at(deadline):
            return await items.get()
    except TimeoutError:
        raise DeadlineExceededError(f"{method} did not end within its time") from None
