"""Both ends of links for tests: real ones in one line, and ends that a test scripts frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import ssl as tls
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import numpy as np
from pimoe.runtime.errors import LinkError
from pimoe.runtime.links import LinkClient, LinkLimits, LinkServer
from pimoe.runtime.links.addresses import new_unix_address, remove_unix_address
from pimoe.runtime.links.authentication import new_nonce, prove
from pimoe.runtime.links.connection import LinkConnection
from pimoe.runtime.links.frames import Frame, Kind
from pimoe.runtime.links.messages import Handler
from pimoe.runtime.requests import TensorData
from waiting import eventually

SECRET = b"the secret of the application"
Transport = Literal["unix", "tcp"]


def tensor(values: Any, dtype: str = "float32") -> TensorData:
    """A tensor request's worth of numbers."""
    array = np.array(values, dtype)
    return TensorData(dtype, array.shape, array.tobytes())


@contextlib.asynccontextmanager
async def serving(
    handler: Handler,
    transport: Transport = "unix",
    secret: bytes = SECRET,
    limits: LinkLimits | None = None,
    credits: int | None = None,
    ssl: tls.SSLContext | None = None,
) -> AsyncIterator[LinkServer]:
    """A server that listens on one address."""
    server = LinkServer(handler, secret, limits, credits)
    if transport == "unix":
        await server.listen_unix(new_unix_address(("test",)))
    else:
        await server.listen_tcp("127.0.0.1", 0, ssl)
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def linked(
    handler: Handler,
    transport: Transport = "unix",
    limits: LinkLimits | None = None,
    credits: int | None = None,
) -> AsyncIterator[tuple[LinkServer, LinkClient]]:
    """A server and one client of it."""
    async with serving(handler, transport, limits=limits, credits=credits) as server:
        client = await LinkClient.connect(server.addresses[0], SECRET, limits)
        try:
            yield server, client
        finally:
            await client.close()


class Peer:
    """An end of a link that keeps what it receives and sends what it is told."""

    def __init__(self, received: Callable[[Peer, Frame], None] = lambda peer, frame: None) -> None:
        self.frames: list[Frame] = []
        self.closed = False
        self.nonce = new_nonce()
        self._answer = received
        self.connection = LinkConnection(LinkLimits(), lambda _: None, self._received, self._lost)
        self.send = self.connection.send

    @classmethod
    async def connect(cls, address: str, secret: bytes | None = SECRET) -> Peer:
        """Connect to a server; authenticate, unless there is no secret."""
        peer = cls()
        loop = asyncio.get_running_loop()
        if address.startswith("unix:"):
            await loop.create_unix_connection(lambda: peer.connection, address.removeprefix("unix:"))
        else:
            host, port = address.removeprefix("tcp:").split(":")
            await loop.create_connection(lambda: peer.connection, host, int(port))
        if secret is not None:
            hello = await peer.frame(Kind.HELLO)
            proof = prove(secret, b"client", peer.nonce, hello.header["nonce"])
            peer.send(Kind.PROOF, 0, {"nonce": peer.nonce, "proof": proof})
            await peer.frame(Kind.WELCOME)
        return peer

    def _received(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._answer(self, frame)

    def _lost(self, error: LinkError | None) -> None:
        self.closed = True

    def of(self, kind: Kind) -> list[Frame]:
        """What came of `kind`."""
        return [frame for frame in self.frames if frame.kind is kind]

    async def frame(self, kind: Kind) -> Frame:
        """The first frame of `kind`, once it came."""
        await eventually(lambda: self.of(kind))
        return self.of(kind)[0]

    def stop_reading(self) -> None:
        """From now on leave what arrives in the socket."""
        assert self.connection._transport is not None
        self.connection._transport.pause_reading()

    async def close(self) -> None:
        """Hang up."""
        self.connection.abort()
        await self.connection.wait_closed()


def welcome(peer: Peer, frame: Frame, secret: bytes = SECRET) -> None:
    """A server's answer to a client's proof."""
    if frame.kind is Kind.PROOF:
        proof = prove(secret, b"server", peer.nonce, frame.header["nonce"])
        peer.connection.lift_limits()
        peer.send(Kind.WELCOME, 0, {"proof": proof, "credits": None})


@contextlib.asynccontextmanager
async def scripted_server(
    received: Callable[[Peer, Frame], None] = welcome, greeting: Sequence[tuple[Kind, dict[str, Any] | None]] = ()
) -> AsyncIterator[tuple[str, list[Peer]]]:
    """A server that greets with a challenge, unless told otherwise, and answers as `received` says.

    Yields its address and all its peers.
    """
    address = new_unix_address(("scripted",))
    peers: list[Peer] = []

    def new_peer() -> LinkConnection:
        peer = Peer(received)
        peers.append(peer)
        peer.connection._on_open = lambda _: [
            peer.send(kind, 0, header) for kind, header in greeting or [(Kind.HELLO, {"nonce": peer.nonce})]
        ]
        return peer.connection

    server = await asyncio.get_running_loop().create_unix_server(new_peer, address.removeprefix("unix:"))
    try:
        yield address, peers
    finally:
        server.close()
        for peer in peers:
            await peer.close()
        remove_unix_address(address)
