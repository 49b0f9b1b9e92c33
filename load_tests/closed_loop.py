"""Closed-loop HTTP load: by wrk, or where that is missing by connections of an event loop of this process.

Python takes several times the processor time of wrk for each request, on the cores that what is measured runs on
too: only numbers of one generator can be compared.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from urllib.parse import urlsplit

import wrk
from report import quantile
from serving_client import Answer, Connection, request_bytes
from wrk import ERRORS, TIMEOUT_S, Load, Target

GENERATOR = "closed_loop.py"
_PAUSE_S = 0.01  # after an error: a broken server refuses faster than a good one answers


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


@dataclass
class _Tally:
    requests: Iterator[bytes]
    timeout_s: float
    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(ERRORS, 0)))


async def closed_loop(target: Target, connections: int, seconds: float, timeout_s: float = TIMEOUT_S) -> Load:
    """The same without wrk. What is under way at the end is waited for and counted.

    Raises:
        OSError: it cannot be reached at all.
    """
    place = urlsplit(target.url)
    host, port = place.hostname or "127.0.0.1", place.port or 80
    tally = _Tally(cycle(_requests(target)), timeout_s)
    opened = [await Connection.connect(port, host) for _ in range(connections)]
    started = time.perf_counter()
    await asyncio.gather(*(_ask_until(started + seconds, one, (port, host), tally) for one in opened))
    elapsed_s = time.perf_counter() - started
    us = [1e6 * (quantile(tally.latencies_s, q) if tally.latencies_s else 0.0) for q in (0.5, 0.9, 0.99, 1.0)]
    return Load(len(tally.latencies_s), elapsed_s, *us, errors=dict(tally.errors), generator=GENERATOR)


async def _ask_until(until: float, connection: Connection, place: tuple[int, str], tally: _Tally) -> None:
    while (sent := time.perf_counter()) < until:
        try:
            if not connection.is_open:  # it broke, or its server closes it after any answer
                connection = await Connection.connect(*place)
            answer = await _answered(connection, next(tally.requests), tally.timeout_s)
        except OSError as error:
            connection.close()
            tally.errors["timeout" if isinstance(error, TimeoutError) else "read"] += 1
            await asyncio.sleep(_PAUSE_S)
        else:
            tally.latencies_s.append(time.perf_counter() - sent)
            tally.errors["status"] += answer.status > 399
    connection.close()


async def _answered(connection: Connection, request: bytes, timeout_s: float) -> Answer:
    async with asyncio.timeout(timeout_s):
        return await connection.ask(request)


def _requests(target: Target) -> list[bytes]:
    place = urlsplit(target.url)
    path = (place.path or "/") + (f"?{place.query}" if place.query else "")
    return [
        request_bytes(path, target.headers, body, target.method, place.netloc) for body in target.bodies or (b"",)
    ]
