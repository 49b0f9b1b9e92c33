"""One socket of a link: bytes in, frames out, and back-pressure. Both ends use it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..errors import ConfigurationError, LinkClosedError, LinkError, LinkProtocolError, PayloadTooLargeError
from ..requests import TensorData
from .frames import PREFIX, Frame, FrameReader, Kind, encode_frame, encode_packed, with_shared_body
from .messages import Buffer, Packed
from .shared_memory import Outbox, SharedMemory

_HANDSHAKE_HEADER_BYTES = 4096
_JOIN_UP_TO_BYTES = 64 * 1024  # copying so little costs less than giving the kernel one buffer more
_SHARE_FROM_BYTES = 64 * 1024  # up to twice as much both ways take about as long


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Bounds of a link; give both ends the same.

    Attributes:
        max_header_bytes, max_body_bytes: of one frame. A sender refuses a longer one with `PayloadTooLargeError`;
            a receiver gives up the link.
        handshake_timeout_s: from connecting to mutual authentication.
        ping_interval_s, ping_timeout_s: a client pings an open link, and gives it up when nothing at all has
            come back for `ping_timeout_s`. That must exceed the longest single computation of the peer, whose
            loop may be busy with it.
        max_stream_items: items of one stream that may wait for their reader; beyond, the stream fails.
        write_buffer_bytes: above this senders wait until the peer has read.
        shared_memory_bytes: room for large bodies under way on a Unix link, in each direction; beyond, they go
            through the socket. 0: all do. What bodies once filled is kept for others as long as the link lives.
    """

    max_header_bytes: int = 4 * 2**20
    max_body_bytes: int = 512 * 2**20
    max_connections: int = 256
    max_streams: int = 4096
    max_stream_items: int = 2**16
    handshake_timeout_s: float = 5.0
    ping_interval_s: float = 5.0
    ping_timeout_s: float = 60.0
    write_buffer_bytes: int = 4 * 2**20
    shared_memory_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if (value := getattr(self, name)) <= 0 and (name, value) != ("shared_memory_bytes", 0):
                raise ConfigurationError(f"links.{name} is {value}; it must be above 0", name)


class LinkConnection(asyncio.BufferedProtocol):
    """Reads frames into `on_frame` and writes them.

    Args:
        on_frame: called with every whole frame, on the event loop.
        on_closed: called once, with the reason (None: closed by this end, or end of file).
        reads_when_full: whether to read on while the peer does not read. A server must not: its answers to a peer
            that only sends would pile up. A client must: were neither end to read, both would wait for ever.
    """

    def __init__(
        self,
        limits: LinkLimits,
        on_open: Callable[[LinkConnection], None],
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[LinkError | None], None],
        reads_when_full: bool = True,
    ) -> None:
        self._limits = limits
        self._reads_when_full = reads_when_full
        self._on_open, self._on_frame, self._on_closed = on_open, on_frame, on_closed
        # Until the peer is authenticated it may send only the small frames of the handshake.
        self._reader = FrameReader(_HANDSHAKE_HEADER_BYTES, 0)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()
        self._error: LinkError | None = None
        self._outbox: Outbox | None = None
        self.closed = False
        self.received = 0  # how often anything at all came in

    def lift_limits(self) -> None:
        """The peer is authenticated: accept frames up to the link's limits."""
        self._reader.max_header_bytes = self._limits.max_header_bytes
        self._reader.max_body_bytes = self._limits.max_body_bytes

    @property
    def is_local(self) -> bool:
        """Whether the peer is on this machine for certain: the socket is a Unix one."""
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        return sock is not None and sock.family == socket.AF_UNIX

    def share(self, memory: SharedMemory) -> None:
        """From now on large bodies go through memory that the peer maps too, as far as there is room."""
        self._outbox, self._reader.inbox = memory

    def send(
        self,
        kind: Kind,
        stream: int,
        header: dict[str, Any] | None = None,
        tensors: Sequence[TensorData] = (),
    ) -> None:
        """Queue a frame for writing. Its tensors' memory must stay unchanged until it is written.

        Raises:
            LinkClosedError: the socket is gone.
            PayloadTooLargeError: the frame is over the link's limits, at which the peer would give up the link.
            LinkProtocolError: the tensors are none that can be sent.
        """
        if self.closed or self._transport is None:
            raise LinkClosedError("the link is closed")
        self._write(self._transport, encode_frame(kind, stream, header, tensors))

    def send_packed(self, kind: Kind, stream: int, packed: Packed) -> None:
        """As `send`, of a packed frame.

        Raises: as `send`.
        """
        if self.closed or self._transport is None:
            raise LinkClosedError("the link is closed")
        self._write(self._transport, encode_packed(kind, stream, packed))

    def _write(self, transport: asyncio.Transport, buffers: list[Buffer]) -> None:
        total_bytes = sum(map(len, buffers))
        header_bytes = len(buffers[0]) - PREFIX.size
        body_bytes = total_bytes - len(buffers[0])
        if header_bytes > self._limits.max_header_bytes or body_bytes > self._limits.max_body_bytes:
            raise PayloadTooLargeError(f"a frame of {header_bytes} + {body_bytes} bytes is over the link's limits")
        put = None
        if self._outbox is not None and body_bytes >= _SHARE_FROM_BYTES:
            put = self._outbox.put(buffers[1:], body_bytes)
        if put is not None:
            transport.write(with_shared_body(buffers[0], *put))
        elif total_bytes <= _JOIN_UP_TO_BYTES:
            transport.write(b"".join(buffers))
        else:
            transport.writelines(buffers)

    @property
    def writable(self) -> bool:
        """Whether `drain` would return at once."""
        return self._writable.is_set() and not self.closed

    async def drain(self) -> None:
        """Wait while the peer reads too slowly.

        Raises:
            LinkClosedError: the socket is gone.
        """
        # Again and again: of many who wait, the first to go on may fill the buffer for the next.
        while not self._writable.is_set():
            await self._writable.wait()
        if self.closed:
            raise LinkClosedError("the link is closed")

    def abort(self, error: LinkError | None = None) -> None:
        """Close at once; `error` is what `on_closed` is told."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until an aborted connection has told `on_closed`."""
        if self._transport is not None:
            await self._gone.wait()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        self._transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        _tune_socket(transport.get_extra_info("socket"))
        self._on_open(self)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self.closed = True
        self._writable.set()
        if self._error is None and error is not None:
            self._error = LinkClosedError(f"the link broke: {error}")
        self._outbox = self._reader.inbox = None
        self._gone.set()
        self._on_closed(self._error)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.clear()
        if not self._reads_when_full and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.set()
        if not self._reads_when_full and self._transport is not None:
            self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """See `asyncio.BufferedProtocol`."""
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        self.received += 1
        try:
            for frame in self._reader.buffer_updated(nbytes):
                self._on_frame(frame)
        except LinkError as error:
            self.abort(error)
        except Exception as error:  # a peer's odd header must cost its link, never the loop
            self.abort(LinkProtocolError(f"bad frame: {type(error).__name__}: {error}"))

    def eof_received(self) -> bool:
        """See `asyncio.BaseProtocol`."""
        return False


def _tune_socket(sock: socket.socket | None) -> None:
    if sock is None:
        return
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A peer whose machine vanished is noticed by the kernel too, not only by pings.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    else:
        # Large frames pass a Unix socket in few system calls only with room in its buffers.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
