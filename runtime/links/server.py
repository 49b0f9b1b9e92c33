"""The serving end of links: authenticates peers and hands their calls to one handler."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import ssl as tls
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..errors import (
    DeadlineExceededError,
    LinkAuthenticationError,
    LinkError,
    LinkProtocolError,
    OverloadedError,
    PimoeError,
    RequestCancelledError,
)
from ..requests import TensorData
from .addresses import remove_unix_address
from .authentication import new_nonce, prove, verify
from .connection import LinkConnection, LinkLimits
from .frames import Frame, Kind, unpack_call
from .messages import Call, Handler, Packed, Reply
from .shared_memory import SharedMemory, accept

_log = logging.getLogger(__name__)
_AT_ONCE = (Reply, Packed)


class LinkServerStatistics(NamedTuple):
    """Counts since start, and what is open now."""

    connections: int
    streams: int
    calls: int
    errors: int
    rejected_peers: int


class LinkServer:
    """Listens on any number of addresses; every authenticated peer's calls go to `handler`.

    Args:
        handler: answers a call at once, as an awaitable, or as an async iterator of items.
        secret: the application's link secret.
        credits: how many calls each client may keep in flight (None: no limit but `limits.max_streams`).
    """

    def __init__(
        self, handler: Handler, secret: bytes, limits: LinkLimits | None = None, credits: int | None = None
    ) -> None:
        self.handler = handler
        self.secret = secret
        self.limits = limits or LinkLimits()
        self.credits = credits
        self.addresses: list[str] = []
        self.calls = self.errors = self.rejected_peers = 0
        self.draining = self.closing = False
        self._servers: list[asyncio.Server] = []
        self._peers: set[_Peer] = set()

    async def listen_unix(self, address: str) -> str:
        """Listen on `unix:/path`, readable by this user only."""
        path = address.removeprefix("unix:")
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_unix_server(self._new_peer, path))
        os.chmod(path, 0o600)
        self.addresses.append(address)
        return address

    async def listen_tcp(self, host: str, port: int = 0, ssl: tls.SSLContext | None = None) -> str:
        """Listen on TCP (port 0: any free one); the address with the port that was given."""
        loop = asyncio.get_running_loop()
        handshake_s = None if ssl is None else self.limits.handshake_timeout_s
        server = await loop.create_server(self._new_peer, host, port, ssl=ssl, ssl_handshake_timeout=handshake_s)
        self._servers.append(server)
        address = f"tcp:{host}:{server.sockets[0].getsockname()[1]}"
        self.addresses.append(address)
        return address

    def _new_peer(self) -> LinkConnection:
        return _Peer(self, self._peers).connection

    def statistics(self) -> LinkServerStatistics:
        """See `LinkServerStatistics`."""
        streams = sum(len(peer.tasks) for peer in self._peers)
        return LinkServerStatistics(len(self._peers), streams, self.calls, self.errors, self.rejected_peers)

    def drain(self) -> None:
        """Tell every peer, those to come too, to send new calls elsewhere; those in flight go on."""
        self.draining = True
        for peer in self._peers:
            if peer.authenticated:
                peer.send(Kind.GOAWAY, 0)

    async def close(self) -> None:
        """Stop listening, close every link, cancel what runs and wait for its end, remove the Unix sockets."""
        self.closing = True
        for server in self._servers:
            server.close()
        peers = list(self._peers)
        tasks = [task for peer in peers for task in peer.tasks.values()]
        for peer in peers:
            peer.connection.abort()
        for peer in peers:
            await peer.connection.wait_closed()  # cancels its tasks
        await asyncio.gather(*tasks, return_exceptions=True)
        for address in self.addresses:
            if address.startswith("unix:"):
                remove_unix_address(address)


class _Peer:
    """One client of the server: handshake, then calls."""

    def __init__(self, server: LinkServer, peers: set[_Peer]) -> None:
        self.server = server
        self.peers = peers
        self.authenticated = False
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.nonce = new_nonce()
        self.loop = asyncio.get_running_loop()
        self.handshake_timer: asyncio.TimerHandle | None = None
        self.connection = LinkConnection(
            server.limits, self._opened, self._received, self._closed, reads_when_full=False
        )

    def send(
        self,
        kind: Kind,
        stream: int,
        header: dict[str, Any] | None = None,
        tensors: Sequence[TensorData] = (),
    ) -> None:
        """Send, unless the peer is gone; then nobody is left to be told."""
        if not self.connection.closed:
            self.connection.send(kind, stream, header, tensors)

    def respond(self, stream: int, answer: Reply | Packed) -> None:
        """Send a call's answer, or the end of its items; as `send`."""
        if self.connection.closed:
            return
        if isinstance(answer, Packed):
            self.connection.send_packed(Kind.PACKED_RESPONSE, stream, answer)
        else:
            self.connection.send(Kind.RESPONSE, stream, {"h": answer.meta}, answer.tensors)

    def _opened(self, connection: LinkConnection) -> None:
        self.peers.add(self)
        if self.server.closing or len(self.peers) > self.server.limits.max_connections:
            connection.abort(LinkProtocolError("too many connections"))
            return
        self.handshake_timer = self.loop.call_later(
            self.server.limits.handshake_timeout_s,
            connection.abort,
            LinkAuthenticationError("handshake timed out"),
        )
        connection.send(Kind.HELLO, 0, {"nonce": self.nonce})

    def _closed(self, error: LinkError | None) -> None:
        self.peers.discard(self)
        if self.handshake_timer is not None:
            self.handshake_timer.cancel()
        if not self.authenticated:
            self.server.rejected_peers += 1
        for task in self.tasks.values():
            task.cancel()

    def _received(self, frame: Frame) -> None:
        if not self.authenticated:
            self._authenticate(frame)
        elif frame.kind is Kind.PACKED_REQUEST or frame.kind is Kind.REQUEST:
            self._start(frame.stream, self._call_of(frame))
        elif frame.kind is Kind.CANCEL:
            if (task := self.tasks.get(frame.stream)) is not None:
                task.cancel()
        elif frame.kind is Kind.PING:
            self.send(Kind.PONG, frame.stream)
        else:
            raise LinkProtocolError(f"a client must not send {frame.kind.name}")

    def _authenticate(self, frame: Frame) -> None:
        peer_nonce = frame.header.get("nonce")
        secret = self.server.secret
        proof = frame.header.get("proof")
        if (
            frame.kind is not Kind.PROOF
            or not isinstance(peer_nonce, bytes)
            or not verify(secret, b"client", peer_nonce, self.nonce, proof)
        ):
            raise LinkAuthenticationError("peer did not prove the link secret")
        self.authenticated = True
        self.connection.lift_limits()
        if self.handshake_timer is not None:
            self.handshake_timer.cancel()
        own_proof = prove(secret, b"server", self.nonce, peer_nonce)
        memory = self._accepted(frame.header.get("memory"))
        welcome = {"proof": own_proof, "credits": self.server.credits, "memory": memory is not None}
        self.connection.send(Kind.WELCOME, 0, welcome)
        if memory is not None:
            self.connection.share(memory)
        if self.server.draining:
            self.connection.send(Kind.GOAWAY, 0)

    def _accepted(self, offered: object) -> SharedMemory | None:
        most_bytes = self.server.limits.shared_memory_bytes
        return accept(offered, most_bytes) if offered is not None and most_bytes else None

    def _call_of(self, frame: Frame) -> Call:
        packed, header = frame.packed, frame.header
        if packed is not None:
            remaining_s, method, meta = unpack_call(packed.meta)
            call = Call(method, {}, [], self.loop.time() + remaining_s, Packed(meta, packed.body))
        else:
            remaining_s = float(header["s"])
            call = Call(header["m"], header.get("h") or {}, frame.tensors, self.loop.time() + remaining_s)
        if math.isnan(remaining_s):
            raise LinkProtocolError("a call's remaining time is no number")
        return call

    def _start(self, stream: int, call: Call) -> None:
        if stream in self.tasks:
            raise LinkProtocolError(f"stream {stream} is already open")
        self.server.calls += 1
        if len(self.tasks) >= self.server.limits.max_streams:
            self._fail(stream, OverloadedError("too many calls in flight on this link", retry_after_s=1.0))
            return
        try:
            answer = self.server.handler(call)
            if isinstance(answer, _AT_ONCE):
                self.respond(stream, answer)
                return
        except Exception as error:  # whatever a handler does is the call's outcome, never the link's
            self._fail(stream, error)
            return
        task = self.tasks[stream] = self.loop.create_task(self._finish(stream, call, answer))
        task.add_done_callback(partial(self._finished, stream, answer))

    def _finished(self, stream: int, answer: Any, task: asyncio.Task[None]) -> None:
        self.tasks.pop(stream, None)
        if asyncio.iscoroutine(answer):
            answer.close()  # a task that was cancelled before it began has not awaited it

    async def _finish(self, stream: int, call: Call, answer: Any) -> None:
        limit = asyncio.timeout_at(call.deadline)
        try:
            async with limit:
                if isinstance(answer, AsyncIterator):
                    reply = await self._send_items(stream, answer)
                else:
                    reply = await answer
            self.respond(stream, reply)
        except asyncio.CancelledError:
            self._fail(stream, RequestCancelledError("the call was cancelled"))
            raise
        except Exception as error:  # as in `_start`
            late = limit.expired() and isinstance(error, TimeoutError)
            self._fail(stream, DeadlineExceededError("the call's time ran out") if late else error)

    async def _send_items(self, stream: int, items: AsyncIterator[Reply]) -> Reply:
        try:
            async for item in items:
                self.send(Kind.ITEM, stream, {"h": item.meta}, item.tensors)
                await self.connection.drain()
        finally:
            # A cancelled call must close its generator now, not when the garbage collector comes by.
            if (aclose := getattr(items, "aclose", None)) is not None:
                await aclose()
        return Reply()

    def _fail(self, stream: int, error: Exception) -> None:
        self.server.errors += 1
        if not isinstance(error, PimoeError):
            _log.error("a link call failed", exc_info=error)
            error = PimoeError(f"internal error: {type(error).__name__}")
        self.send(Kind.ERROR, stream, error.to_wire())
