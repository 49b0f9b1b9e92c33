"""The open loop accounts for every request, whatever becomes of it, and its arrivals are a Poisson process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"


@pytest.fixture(scope="module", autouse=True)
def load_tests_importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


def module(name: str) -> Any:
    return import_module(name)


Handler = Callable[[int], Awaitable[int | None]]


@asynccontextmanager
async def http_server(handler: Handler) -> AsyncIterator[int]:
    """The port of a server that answers each request, by its number, with a status; None: it hangs up."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while True:
                await reader.readuntil(b"\r\n\r\nbody")
                number, count = count, count + 1
                status = await handler(number)
                if status is None:
                    return
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\nok".encode())
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def a_request() -> list[bytes]:
    found: bytes = module("serving_client").request_bytes("/infer", {"X": "y"}, b"body")
    return [found]


async def test_an_open_loop_tells_apart_how_requests_end() -> None:
    statuses = [200, 503, 429, 500, None]

    async def handler(number: int) -> int | None:
        return statuses[number % 5]

    async with http_server(handler) as port:
        outcome = await module("serving_open_loop").offer(port, a_request(), [0.001 * i for i in range(50)])
    assert outcome.offered == 50
    assert (outcome.answered, outcome.refused, outcome.failed, outcome.late) == (10, 20, 20, 0)
    assert 0 < outcome.p50_s <= outcome.p99_s


async def test_an_open_loop_goes_on_when_nobody_answers_and_counts_what_it_could_not_send() -> None:
    asked = 0

    async def silent(number: int) -> int | None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(3600)
        return 200

    async with http_server(silent) as port:
        offer = module("serving_open_loop").offer
        outcome = await offer(port, a_request(), [0.0] * 20, timeout_s=0.3, max_in_flight=4)
    assert (outcome.offered, outcome.late) == (20, 20)
    assert outcome.p50_s is None
    assert asked <= 4 * 2, "in flight is bounded, and what is out of time is not sent"


async def test_what_waits_for_a_connection_waits_on_its_own_account() -> None:
    """Ten at once over one connection, 20 ms each: a loop that started clocks when it sent would say 20 ms."""

    async def slow(number: int) -> int | None:
        await asyncio.sleep(0.02)
        return 200

    async with http_server(slow) as port:
        offer = module("serving_open_loop").offer
        outcome = await offer(port, a_request(), [0.0] * 10, max_in_flight=1)
    assert outcome.answered == 10
    assert outcome.p99_s >= 10 * 0.02


async def test_nobody_there_is_a_failure_of_each() -> None:
    from pimoe.deployments.cluster import free_port

    outcome = await module("serving_open_loop").offer(free_port(), a_request(), [0.0] * 5)
    assert outcome.failed == 5


def test_poisson_arrivals_are_the_same_every_time_and_about_as_many_as_asked_for() -> None:
    poisson = module("serving_open_loop").poisson
    due = poisson(500.0, 10.0)
    assert due == poisson(500.0, 10.0)
    assert due != poisson(500.0, 10.0, seed=1)
    assert due == sorted(due)
    assert 0 <= due[0] <= due[-1] < 10
    assert abs(len(due) - 5000) < 5 * 5000**0.5
    gaps = [b - a for a, b in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.1), "exponential"
