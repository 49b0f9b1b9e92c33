"""What any second level is made of: the breaker with numbers, the queue behind the answers."""

from __future__ import annotations

import asyncio

import pytest
from pimoe.runtime.caching.entry import CachedAnswer
from pimoe.runtime.caching.result_cache import EntryTags
from pimoe.runtime.caching.second_level import Breaker, PendingWrite, WriteBehind
from pimoe.runtime.requests import TokenChunk
from waiting import eventually, nothing_left_behind

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TAGS = EntryTags()
ANSWER = CachedAnswer("id", 1, (TokenChunk((1,), "stop"),))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_breaker_opens_after_failures_in_a_row() -> None:
    breaker = Breaker(3, 1.0, Clock())
    for _ in range(2):
        assert not breaker.failed()
    breaker.succeeded()
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.is_open
    assert not breaker.allows()
    assert breaker.opened == 1


async def test_an_open_breaker_lets_one_probe_through_at_a_time() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock)
    breaker.failed()
    for _ in range(3):  # a probe that fails, or of which nothing is heard, is followed by the next
        clock.now += 1.9
        assert not breaker.allows()
        clock.now += 0.2
        assert [breaker.allows() for _ in range(3)] == [True, False, False]
    assert not breaker.failed()
    assert breaker.opened == 1
    assert breaker.succeeded()
    assert breaker.allows()
    assert breaker.allows()
    assert not breaker.succeeded()


async def test_failures_that_come_in_late_put_the_next_probe_off() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock)
    breaker.failed()
    clock.now += 1.5
    breaker.failed()
    clock.now += 1.0
    assert not breaker.allows()
    clock.now += 1.0
    assert breaker.allows()


class Store:
    """Takes a write whenever it is allowed to."""

    def __init__(self, max_entries: int = 10, max_bytes: int = 1000) -> None:
        self.allowed = asyncio.Semaphore(0)
        self.written: list[bytes] = []
        self.dropped: list[str] = []
        self.queue = WriteBehind(self.write, self.dropped.append, max_entries, max_bytes)

    async def write(self, pending: PendingWrite) -> None:
        await self.allowed.acquire()
        self.written.append(pending.key)

    def add(self, key: bytes, tags: EntryTags = TAGS, size_bytes: int = 10) -> None:
        self.queue.add(PendingWrite(key, tags, ANSWER, size_bytes, b""))

    def allow(self, count: int) -> None:
        for _ in range(count):
            self.allowed.release()


async def test_writes_happen_in_order_behind_the_caller() -> None:
    store = Store()
    for n in range(5):
        store.add(bytes([n]))
    assert (len(store.queue), store.queue.pending_bytes, store.written) == (5, 50, [])
    store.allow(5)
    await eventually(lambda: store.written == [bytes([n]) for n in range(5)])
    assert (len(store.queue), store.queue.pending_bytes) == (0, 0)
    store.add(b"later")
    store.allow(1)
    await eventually(lambda: store.written[-1] == b"later")
    await store.queue.close()


@pytest.mark.parametrize("store", [{"max_entries": 2}, {"max_bytes": 20}])
async def test_what_finds_the_queue_full_is_dropped(store: dict[str, int]) -> None:
    full = Store(**store)
    for n in range(5):
        full.add(bytes([n]))
    assert full.dropped == ["full"] * 3
    full.allow(5)
    await eventually(lambda: full.written == [b"\0", b"\1"])
    await full.queue.close()


async def test_what_waits_may_be_forgotten() -> None:
    store = Store()
    for model in "ab":
        for tenant in "xy":
            store.add(f"{model}{tenant}".encode(), EntryTags(model, tenant))
    store.queue.forget("a", "x")
    assert (len(store.queue), store.queue.pending_bytes) == (3, 30)
    store.queue.forget(None, "y")
    assert len(store.queue) == 1
    store.queue.forget("a", None)
    store.allow(4)
    await eventually(lambda: store.written == [b"bx"])
    assert store.dropped == ["flushed"] * 3
    await store.queue.close()


async def test_closing_gives_up_what_waits() -> None:
    store = Store()
    store.add(b"1")
    store.add(b"2")
    await store.queue.close()
    assert (len(store.queue), store.queue.pending_bytes, store.written) == (0, 0, [])
