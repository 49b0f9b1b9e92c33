"""An open loop: requests come when they are due, a Poisson process, whatever became of those before them.

A closed loop asks again only when it was answered, so that a slow server is asked less, and hides its queue. Here
a request's latency counts from the moment it was due: what it waits for a free connection is in it.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from report import quantile
from serving_client import Connection

# What servers say when they are full, or gave up.
REFUSALS = frozenset((408, 429, 503, 504))


@dataclass(frozen=True)
class OpenLoop:
    """What became of all that was offered.

    Attributes:
        offered: requests that were due; the sum of the next four.
        answered: with 200, within the timeout.
        refused: by the server: 408, 429, 503, 504.
        late: not answered within the timeout from when they were due, or never sent because all connections were
            busy for so long.
        failed: another status, or the connection broke.
        p50_s, p99_s: from due to answered, of those answered; None where none was.
        lag_p99_s: from due until the generator looked at it, sent or not: its own part in the latencies.
    """

    offered: int
    answered: int
    refused: int
    late: int
    failed: int
    p50_s: float | None
    p99_s: float | None
    lag_p99_s: float


def poisson(requests_per_s: float, duration_s: float, seed: int = 0) -> list[float]:
    """When requests are due, in seconds from the start; the same every time."""
    chance = random.Random(seed)
    due, now = [], chance.expovariate(requests_per_s)
    while now < duration_s:
        due.append(now)
        now += chance.expovariate(requests_per_s)
    return due


@dataclass
class _Tally:
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("refused", "late", "failed"), 0))
    latencies: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)


async def offer(
    port: int, requests: Sequence[bytes], due_s: Sequence[float], timeout_s: float = 5.0, max_in_flight: int = 512
) -> OpenLoop:
    """Send them, in turn, when they are due.

    Args:
        requests: as `serving_client.request_bytes` makes them.
        due_s: in order.
        max_in_flight: connections, each with one request; what is due while all are busy waits for one.
    """
    tally = _Tally()
    ready: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()
    count = min(max_in_flight, len(due_s))
    senders = [asyncio.create_task(_send(port, requests, ready, timeout_s, tally)) for _ in range(count)]
    clock = threading.Thread(
        target=_tick, args=(asyncio.get_running_loop(), ready, due_s, tally, count), daemon=True
    )
    clock.start()
    await asyncio.gather(*senders)
    clock.join()
    latencies = tally.latencies
    p50_s, p99_s = (quantile(latencies, share) if latencies else None for share in (0.5, 0.99))
    lag_s = quantile(tally.lags, 0.99) if tally.lags else 0.0
    return OpenLoop(len(due_s), len(latencies), **tally.counts, p50_s=p50_s, p99_s=p99_s, lag_p99_s=lag_s)


def _tick(
    loop: asyncio.AbstractEventLoop,
    ready: asyncio.Queue[tuple[int, float] | None],
    due_s: Sequence[float],
    tally: _Tally,
    senders: int,
) -> None:
    """In a thread, since timers of event loops are a millisecond apart."""
    started = time.monotonic()

    def is_due(index: int, at: float) -> None:
        tally.lags.append(time.monotonic() - at)
        ready.put_nowait((index, at))

    for index, after in enumerate(due_s):
        at = started + after
        if (pause := at - time.monotonic()) > 0:
            time.sleep(pause)
        loop.call_soon_threadsafe(is_due, index, at)
    for _ in range(senders):
        loop.call_soon_threadsafe(ready.put_nowait, None)


async def _send(
    port: int,
    requests: Sequence[bytes],
    ready: asyncio.Queue[tuple[int, float] | None],
    timeout_s: float,
    tally: _Tally,
) -> None:
    """One connection: opened when first needed, and again when it broke."""
    connection: Connection | None = None
    while (item := await ready.get()) is not None:
        index, due = item
        try:
            async with asyncio.timeout_at(due + timeout_s):
                if connection is None or not connection.is_open:
                    connection = await Connection.connect(port)
                answer = await connection.ask(requests[index % len(requests)])
        except TimeoutError:
            tally.counts["late"] += 1
            if connection is not None:
                connection.close()
        except OSError:
            tally.counts["failed"] += 1
        else:
            if answer.status == 200:
                tally.latencies.append(time.monotonic() - due)
            else:
                tally.counts["refused" if answer.status in REFUSALS else "failed"] += 1
    if connection is not None:
        connection.close()
