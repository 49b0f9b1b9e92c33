"""Who may open a lane to a group, and when lanes end.

A router that has a link to a replica on its own machine asks for a lane over it. The replica names a socket that
only processes of its own user may connect to, and a token for one use; over the link, so only who proved the
link's secret gets it. Where anything of this fails, dispatches go over the link, as large ones do anyway.

A lane carries one dispatch at a time and ends at the first irregularity; the dispatch is then sent again over
links, which find a sibling if need be.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import struct
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from os import getuid
from typing import Any

from ..errors import PimoeError
from ..links.pool import PooledLink
from ..native.lanes import LaneTable
from .layers import LayerExperts
from .native import NativeExperts

_log = logging.getLogger(__name__)

METHOD = "lane"
TOKEN_BYTES = 32
_HANDSHAKE_S = 5.0
_TOKEN_LIFE_S = 30.0
_MAX_TOKENS = _MAX_LANES = 64
_READY = b"+"
# A whole request or answer, twice over as the kernel counts: who sends one must not have to be woken for its rest.
_SEND_BUFFER_BYTES = 2 * 2**20
_PAUSE_S = 0.1
_REST_S = 10.0  # between one lane that failed and the next


def lane_table(layers: Mapping[int, LayerExperts]) -> LaneTable | None:
    """What lanes compute from; None where other than native experts are held, or sockets have no names here."""
    native = {layer: held.packed for layer, held in layers.items() if isinstance(held, NativeExperts)}
    return LaneTable(native) if len(native) == len(layers) and sys.platform == "linux" else None


class LaneServer:
    """A group's lanes: a thread that accepts them, and one for each. Thread-safe.

    Args:
        table: what they compute from.
    """

    def __init__(self, table: LaneTable) -> None:
        self._table = table
        self._tokens: OrderedDict[bytes, float] = OrderedDict()
        self._lanes: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._closed = False

    def offer(self) -> dict[str, Any]:
        """Where to connect, and the token to send; or that there are as many lanes as may be. Empty where none are
        to be had ever again."""
        with self._lock:
            if self._closed:
                return {}
            if len(self._lanes) >= _MAX_LANES:
                return {"full": True}
            if self._listener is None:
                self._listen()
            assert self._listener is not None
            token = secrets.token_bytes(TOKEN_BYTES)
            self._tokens[token] = time.monotonic() + _TOKEN_LIFE_S
            while len(self._tokens) > _MAX_TOKENS:
                self._tokens.popitem(last=False)
            return {"name": self._listener.getsockname(), "token": token}

    def close(self) -> None:
        """Ends all lanes."""
        with self._lock:
            self._closed = True
            ending = [*self._lanes, *([self._listener] if self._listener is not None else [])]
        for each in ending:
            with contextlib.suppress(OSError):  # a peer that has gone already
                each.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            self._listener.close()

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A name of no file: nothing is left behind, however the process ends.
        self._listener.bind(b"\0pimoe-lane-" + secrets.token_hex(16).encode())
        self._listener.listen(16)
        threading.Thread(target=self._accept, args=(self._listener,), name="lanes", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.warning("no lane for now: %s", error)
                time.sleep(_PAUSE_S)  # out of descriptors, perhaps; others may give some back
                continue
            admitted = self._admits(peer)
            with self._lock:  # with `close`: a lane is ended by it, or never begins
                if admitted and not self._closed:
                    self._lanes.add(peer)
            if peer not in self._lanes:
                peer.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(peer,), name="lane", daemon=True).start()
            except RuntimeError as error:  # no more threads are to be had
                _log.warning("no lane for now: %s", error)
                with self._lock:
                    self._lanes.discard(peer)
                peer.close()

    def _admits(self, peer: socket.socket) -> bool:
        """Whether the peer is of our own user and knows a token, which is used up."""
        with contextlib.suppress(OSError):
            peer.settimeout(_HANDSHAKE_S)
            size = struct.calcsize("3i")
            _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            return user == getuid() and self._uses_up(peer.recv(TOKEN_BYTES, socket.MSG_WAITALL))
        return False

    def _uses_up(self, said: bytes) -> bool:
        with self._lock:
            found = next((token for token in self._tokens if hmac.compare_digest(token, said)), None)
            return found is not None and self._tokens.pop(found) > time.monotonic()

    def _serve(self, peer: socket.socket) -> None:
        try:
            with peer, contextlib.suppress(OSError):
                peer.sendall(_READY)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
                peer.settimeout(None)
                self._table.serve(peer.fileno())
        except MemoryError:
            _log.error("a lane ended: no memory for its dispatch")
        finally:
            with self._lock:
                self._lanes.discard(peer)


class Lane:
    """A router's lane to the replica behind one link. It is opened in the background; where it cannot be, it stays
    shut.

    Args:
        link: to the replica.
    """

    def __init__(self, link: PooledLink) -> None:
        self._link = link
        self._socket: socket.socket | None = None
        self._shut_at: float | None = None
        self._refused = False
        link.companions.append(self.close)
        self._opening: asyncio.Task[None] | None = asyncio.get_running_loop().create_task(self._open())

    @property
    def descriptor(self) -> int | None:
        """Of the open socket, which does not block; None while there is none."""
        return None if self._socket is None else self._socket.fileno()

    @property
    def may_be_replaced(self) -> bool:
        """Whether it was shut some time ago, and another one is worth a try."""
        return self._shut_at is not None and not self._refused and time.monotonic() > self._shut_at + _REST_S

    def close(self) -> None:
        """Ends it for good."""
        self._shut_at = time.monotonic()
        with contextlib.suppress(ValueError):  # called by the link itself
            self._link.companions.remove(self.close)
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _open(self) -> None:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            offer = (await self._link.client.call(METHOD, {}, [], _HANDSHAKE_S)).meta
            if "name" not in offer:
                self._refused = not offer.get("full")
                opened.close()
                self.close()
                return
            async with asyncio.timeout(_HANDSHAKE_S):
                await loop.sock_connect(opened, offer["name"])
                await loop.sock_sendall(opened, offer["token"])
                if await loop.sock_recv(opened, 1) != _READY:
                    raise ConnectionError("it hung up")
        except (PimoeError, OSError, TimeoutError) as error:
            _log.info("no lane to replica %s: %s", self._link.endpoint.replica_id, error)
            opened.close()
            self.close()
            return
        except BaseException:
            opened.close()
            raise
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket = opened
