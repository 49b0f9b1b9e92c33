"""Closed-loop HTTP load: by wrk, or where that is missing by raw sockets on an event loop of this process.

Python takes several times the processor time of wrk for each request, on the cores that what is measured runs on
too: only numbers of one generator can be compared.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from typing import cast
from urllib.parse import urlsplit

import wrk
from report import quantile
from wrk import Load, Target

GENERATOR = "closed_loop.py"


def measure(target: Target, connections: int, seconds: float) -> Load:
    """Ask `target` over so many connections for so long, with wrk where it is installed.

    Raises:
        wrk.WrkError, OSError: it cannot be reached at all.
    """
    if wrk.is_installed():
        return wrk.run(target, connections, seconds)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(closed_loop(target, connections, seconds))


async def closed_loop(target: Target, connections: int, seconds: float) -> Load:
    """The same without wrk. What is under way at the end is waited for and counted.

    Raises:
        OSError: it cannot be reached at all.
    """
    place, loop = urlsplit(target.url), asyncio.get_running_loop()
    requests = cycle(_requests(target))
    clients = [_Client(requests, loop.create_future()) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, place.hostname, place.port or 80)  # type: ignore[misc]
    started = time.perf_counter()
    for client in clients:
        client.start(started + seconds)
    await asyncio.gather(*(client.done for client in clients))
    elapsed = time.perf_counter() - started
    latencies = [latency for client in clients for latency in client.latencies]
    p50, p90, p99, most = (1e6 * quantile(latencies, q) if latencies else 0.0 for q in (0.5, 0.9, 0.99, 1.0))
    errors = Counter({"connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0})
    for client in clients:
        errors.update(client.errors)
    received = sum(client.received_bytes for client in clients)
    return Load(len(latencies), elapsed, p50, p90, p99, most, received, dict(errors), GENERATOR)


def _requests(target: Target) -> list[bytes]:
    place = urlsplit(target.url)
    path = (place.path or "/") + (f"?{place.query}" if place.query else "")
    headers = {"host": place.netloc, **target.headers}
    head = f"{target.method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    if not target.bodies:
        return [f"{head}\r\n".encode()]
    return [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in target.bodies]


class _Client(asyncio.Protocol):
    """One connection: sends the next request when the whole answer to the one before is there."""

    def __init__(self, requests: Iterator[bytes], done: asyncio.Future[None]) -> None:
        self.done = done
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()
        self.received_bytes = 0
        self._requests = requests
        self._buffer = bytearray()
        self._until = self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass of it

    def start(self, until: float) -> None:
        self._until = until
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self.received_bytes += len(data)
        try:
            size = _answer_bytes(self._buffer)
        except ValueError as error:
            self.done.set_exception(error)
            self._transport.close()
            return
        if size is None or len(self._buffer) < size:
            return
        now = time.perf_counter()
        self.latencies.append(now - self._sent)
        self.errors["status"] += self._buffer[9:12] > b"399"
        del self._buffer[:size]
        if now < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if time.perf_counter() < self._until:
            self.errors["read"] += 1
        with suppress(asyncio.InvalidStateError):
            self.done.set_result(None)


def _answer_bytes(buffer: bytearray) -> int | None:
    """Head and body together; None while the head is not whole. Answers have a length: none is chunked.

    Raises:
        ValueError: an answer has no `content-length`.
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(buffer[:end]).lower()
    _, found, rest = head.partition(b"\r\ncontent-length:")
    if not found:
        raise ValueError(f"an answer without content-length: {head[:200]!r}")
    return end + 4 + int(rest.split(b"\r\n", 1)[0])
