"""Single flight: one computation, many readers, each free to come and go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import pytest
from pimoe.runtime.caching.flight import Flight
from pimoe.runtime.errors import DeadlineExceededError, InvalidRequestError, RequestCancelledError
from waiting import eventually, nothing_left_behind

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TINY_S = 0.02


def soon() -> float:
    return time.monotonic() + 20.0


class Source:
    """Yields 0, 1, 2 ... as far as it is allowed, and then ends or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.allowed = 0
        self.given = 0
        self.begun = self.closed = False
        self.changed = asyncio.Event()

    def allow(self, upto: int) -> None:
        self.allowed = upto
        self.changed.set()

    async def items(self, count: int) -> AsyncGenerator[int, None]:
        self.begun = True
        try:
            for n in range(count):
                while n >= self.allowed:
                    self.changed.clear()
                    await self.changed.wait()
                self.given += 1
                yield n
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


class Landing:
    """What the flight told of its end."""

    def __init__(self) -> None:
        self.whole: list[list[int]] = []
        self.begun = self.ended = 0

    def begin(self) -> None:
        self.begun += 1

    def finished(self, items: list[int]) -> None:
        self.whole.append(list(items))

    def end(self) -> None:
        self.ended += 1


def fly(source: Source, count: int = 5) -> tuple[Flight[int], Landing]:
    landing = Landing()
    return Flight(source.items(count), landing.begin, landing.finished, landing.end), landing


async def read(flight: Flight[int], deadline: float | None = None, position: int = 0) -> list[int]:
    with flight.joined():
        return [item async for item in flight.read(deadline or soon(), position)]


async def test_readers_get_everything_whenever_they_join() -> None:
    source = Source()
    flight, landing = fly(source)
    readers = [asyncio.create_task(read(flight))]
    for upto in range(1, 6):
        source.allow(upto)
        await eventually(lambda upto=upto: source.given == upto)
        readers.append(asyncio.create_task(read(flight)))
    assert await asyncio.gather(*readers) == [list(range(5))] * 6
    assert (landing.begun, landing.whole, landing.ended) == (1, [list(range(5))], 1)
    assert await read(flight) == list(range(5))  # after the end too
    assert await read(flight, position=3) == [3, 4]


async def test_a_slow_reader_holds_up_nobody() -> None:
    source = Source()
    flight, landing = fly(source)
    with flight.joined():
        slow = flight.read(soon())
        source.allow(5)
        assert await anext(slow) == 0
        assert await read(flight) == list(range(5))
        assert landing.whole == [list(range(5))]
        assert [item async for item in slow] == [1, 2, 3, 4]


async def test_a_leaving_reader_does_not_end_it_for_others() -> None:
    source = Source()
    flight, landing = fly(source)
    leader, follower = asyncio.create_task(read(flight)), asyncio.create_task(read(flight))
    source.allow(2)
    await eventually(lambda: source.given == 2)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    assert not source.closed
    source.allow(5)
    assert await follower == list(range(5))
    assert landing.whole == [list(range(5))]


async def test_the_last_reader_to_leave_cancels_it() -> None:
    source = Source()
    flight, landing = fly(source)
    readers = [asyncio.create_task(read(flight)) for _ in range(3)]
    source.allow(1)
    await eventually(lambda: source.given == 1)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await eventually(lambda: source.closed)
    assert landing.ended
    assert landing.whole == []
    assert isinstance(flight.error, RequestCancelledError)
    with pytest.raises(RequestCancelledError):
        await read(flight)


async def test_leaving_before_it_began_ends_it_too() -> None:
    source = Source()
    flight, landing = fly(source)
    with flight.joined():
        pass
    assert landing.ended == 1  # at once: nobody may join a dying flight
    await eventually(lambda: flight._task.done())
    assert not source.begun


async def test_leaving_a_flight_that_has_ended_ends_nothing_again() -> None:
    source = Source()
    source.allow(5)
    flight, landing = fly(source)
    assert await read(flight) == list(range(5))
    assert landing.ended == 1


async def test_each_reader_has_its_own_deadline() -> None:
    source = Source()
    flight, _ = fly(source)
    patient = asyncio.create_task(read(flight))
    source.allow(2)
    with pytest.raises(DeadlineExceededError) as raised:
        await read(flight, time.monotonic() + TINY_S)
    assert raised.value is not flight.error
    source.allow(5)
    assert await patient == list(range(5))


async def test_an_error_comes_to_all_after_the_items_before_it() -> None:
    error = InvalidRequestError("no")
    source = Source(error)
    flight, landing = fly(source, 2)

    async def read_until_error() -> list[int]:
        seen: list[int] = []
        with contextlib.suppress(InvalidRequestError), flight.joined():
            async for item in flight.read(soon()):
                seen.append(item)
        return seen

    readers = [asyncio.create_task(read_until_error()) for _ in range(3)]
    source.allow(5)
    assert await asyncio.gather(*readers) == [[0, 1]] * 3
    assert flight.error is error
    assert (landing.whole, landing.ended) == ([], 1)
    with pytest.raises(InvalidRequestError):
        await read(flight)


@pytest.mark.parametrize("error", [InvalidRequestError("at once"), asyncio.CancelledError()])
async def test_a_computation_that_fails_at_once(error: BaseException) -> None:
    async def fail() -> AsyncGenerator[int, None]:
        raise error
        yield 0

    landing = Landing()
    flight = Flight(fail(), landing.begin, landing.finished, landing.end)
    await eventually(lambda: landing.ended)
    with pytest.raises((InvalidRequestError, RequestCancelledError)):
        await read(flight)
    assert landing.ended == 1


# Successors


async def test_an_answer_without_items_begins_all_the_same() -> None:
    flight, landing = fly(Source(), 0)
    assert await read(flight) == []
    assert (landing.begun, landing.whole, landing.ended) == (1, [[]], 1)


async def test_readers_of_a_superseded_flight_read_its_successor() -> None:
    slow, quick = Source(), Source()
    (before, gone), (after, landing) = fly(slow), fly(quick)
    hasty = asyncio.create_task(read(before, time.monotonic() + TINY_S))
    patient = asyncio.create_task(read(before))
    leading = asyncio.create_task(read(after))
    quick.allow(1)
    await eventually(lambda: landing.begun)
    before.supersede(after)
    assert (before.is_done, before.is_empty, before.is_abandoned) == (True, False, False)
    with pytest.raises(DeadlineExceededError):
        await hasty  # its own deadline still
    await eventually(lambda: slow.closed)
    quick.allow(5)
    assert await patient == await leading == await read(before) == list(range(5))
    assert (gone.begun, gone.whole, gone.ended) == (0, [], 1)


async def test_readers_that_were_moved_keep_the_successor_going_and_end_it() -> None:
    (before, _), (after, landing) = fly(Source()), fly(source := Source())
    source.allow(1)
    await eventually(lambda: landing.begun)
    moved = before.joined()
    moved.__enter__()
    with after.joined():
        before.supersede(after)
    assert not after.is_done
    moved.__exit__(None, None, None)
    assert after.is_abandoned
    await eventually(lambda: source.closed)


async def test_an_error_of_the_successor_is_that_of_readers_that_were_moved() -> None:
    (before, _), (after, landing) = fly(Source()), fly(source := Source(InvalidRequestError("no")), 1)
    reader = asyncio.create_task(read(before))
    await asyncio.sleep(0)
    source.allow(1)
    await eventually(lambda: landing.begun)
    before.supersede(after)
    with pytest.raises(InvalidRequestError):
        await reader
