"""One socket of a link: bytes in, frames out, and back-pressure. Both ends use it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..errors import ConfigurationError, LinkClosedError, LinkError, LinkProtocolError
from ..requests import TensorData
from .frames import Frame, FrameReader, Kind, encode_frame

_HANDSHAKE_HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Bounds of a link.

    Attributes:
        handshake_timeout_s: from connecting to mutual authentication.
        ping_interval_s, ping_timeout_s: a client pings an open link, and gives it up when nothing at all has
            come back for `ping_timeout_s`. That must exceed the longest single computation of the peer, whose
            loop may be busy with it.
        max_stream_items: items of one stream that may wait for their reader; beyond, the stream fails.
        write_buffer_bytes: above this senders wait until the peer has read.
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

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"links.{name} is {getattr(self, name)}; it must be above 0", name)


class LinkConnection(asyncio.BufferedProtocol):
    """Reads frames into `on_frame` and writes them.

    Args:
        on_frame: called with every whole frame, on the event loop.
        on_closed: called once, with the reason (None: closed by this end, or end of file).
    """

    def __init__(
        self,
        limits: LinkLimits,
        on_open: Callable[[LinkConnection], None],
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[LinkError | None], None],
    ) -> None:
        self._limits = limits
        self._on_open, self._on_frame, self._on_closed = on_open, on_frame, on_closed
        # Until the peer is authenticated it may send only the small frames of the handshake.
        self._reader = FrameReader(_HANDSHAKE_HEADER_BYTES, 0)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._error: LinkError | None = None
        self.closed = False
        self.received_frames = 0

    def lift_limits(self) -> None:
        """The peer is authenticated: accept frames up to the link's limits."""
        self._reader.max_header_bytes = self._limits.max_header_bytes
        self._reader.max_body_bytes = self._limits.max_body_bytes

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
        """
        if self.closed or self._transport is None:
            raise LinkClosedError("the link is closed")
        self._transport.writelines(encode_frame(kind, stream, header, tensors))

    async def drain(self) -> None:
        """Wait while the peer reads too slowly.

        Raises:
            LinkClosedError: the socket is gone.
        """
        if not self._writable.is_set():
            await self._writable.wait()
        if self.closed:
            raise LinkClosedError("the link is closed")

    def abort(self, error: LinkError | None = None) -> None:
        """Close at once; `error` is what `on_closed` is told."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close after what is queued has been written."""
        if self._transport is not None:
            self._transport.close()

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
        self._on_closed(self._error)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        """See `asyncio.BufferedProtocol`."""
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        try:
            frames = self._reader.buffer_updated(nbytes)
            for frame in frames:
                self.received_frames += 1
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
