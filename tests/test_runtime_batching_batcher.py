"""The batcher: when it dispatches, and that every item gets exactly one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any

import pytest
from pimoe.runtime.batching import Batcher, BatchLimits, QueueLimits
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidTensorError,
    OverloadedError,
    PimoeError,
    RequestCancelledError,
)
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TIMEOUT_S = 20.0
TINY_S = 0.02
HOUR_S = 3600.0


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Model:
    """Holds every batch until the test lets it go, and then answers each value with itself in capitals."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.deadlines: list[float] = []
        self.running: list[asyncio.Future[None]] = []
        self.answer: Callable[[list[str]], Sequence[str]] = lambda batch: [value.upper() for value in batch]

    async def __call__(self, batch: Sequence[str], deadline: float) -> Sequence[str]:
        self.batches.append(list(batch))
        self.deadlines.append(deadline)
        gate = asyncio.get_running_loop().create_future()
        self.running.append(gate)
        await gate
        return self.answer(list(batch))

    def finish(self, index: int = 0) -> None:
        """Let the batch at `index` among the running ones go."""
        self.running.pop(index).set_result(None)


class Bench:
    """A batcher under test."""

    def __init__(self, limits: BatchLimits, queue_limits: QueueLimits, clock: Clock) -> None:
        self.model = Model()
        self.clock = clock
        self.batcher: Batcher[str, str] = Batcher(self.model, limits, queue_limits, clock)

    def submit(
        self,
        value: str,
        tokens: int = 1,
        priority: float = 0.5,
        timeout_s: float = TIMEOUT_S,
        group: Hashable = None,
    ) -> asyncio.Task[str]:
        """Submit as a request would, in a task of its own."""
        return asyncio.create_task(self.batcher.submit(value, tokens, priority, timeout_s, group))

    async def dispatched(self, *batches: str) -> None:
        """Wait until exactly these batches were formed; a batch is written as its values, one letter each."""
        await eventually(lambda: len(self.model.batches) >= len(batches))
        await settle()
        assert ["".join(batch) for batch in self.model.batches] == list(batches)

    @property
    def closed(self) -> dict[str, int]:
        return self.batcher.statistics().closed


async def settle() -> None:
    """Let everything that is ready run."""
    for _ in range(20):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def bench(
    max_batch_tokens: int = 4,
    max_wait_s: float = HOUR_S,
    max_in_flight: int = 2,
    queue_limits: QueueLimits | None = None,
    **limits: Any,
) -> AsyncIterator[Bench]:
    made = Bench(
        BatchLimits(max_batch_tokens, max_wait_s, max_in_flight, **limits), queue_limits or QueueLimits(), Clock()
    )
    made.batcher.start()
    try:
        yield made
    finally:
        await made.batcher.close()
        assert made.batcher.statistics().in_flight == 0


# When batches close


async def test_an_idle_model_gets_the_first_item_at_once() -> None:
    async with bench() as b:
        result = b.submit("a")
        await b.dispatched("a")
        b.model.finish()
        assert await result == "A"
        assert b.closed == {"idle": 1}
        assert b.batcher.statistics()[1:4] == (0, 1, 1)


async def test_a_busy_model_lets_items_accumulate_until_the_batch_is_full() -> None:
    async with bench() as b:
        results = [b.submit("a")]
        await b.dispatched("a")
        results += [b.submit(value) for value in "bcd"]
        await settle()
        await b.dispatched("a")
        results.append(b.submit("e"))
        await b.dispatched("a", "bcde")
        assert b.closed == {"idle": 1, "full": 1}
        b.model.finish(1)
        b.model.finish(0)
        assert await asyncio.gather(*results) == list("ABCDE")


async def test_a_completion_dispatches_what_accumulated() -> None:
    async with bench() as b:
        first = b.submit("a")
        await b.dispatched("a")
        rest = [b.submit(value) for value in "bc"]
        await settle()
        b.model.finish()
        await b.dispatched("a", "bc")
        assert b.closed == {"idle": 2}
        b.model.finish()
        assert await asyncio.gather(first, *rest) == list("ABC")


async def test_a_batch_closes_where_the_next_item_does_not_fit() -> None:
    async with bench() as b:
        results = [b.submit("a")]
        await b.dispatched("a")
        results += [b.submit("b", 3), b.submit("c", 2)]
        await b.dispatched("a", "b")
        assert b.closed == {"idle": 1, "next_does_not_fit": 1}
        b.model.finish()
        b.model.finish()
        await b.dispatched("a", "b", "c")
        b.model.finish()
        assert await asyncio.gather(*results) == list("ABC")


async def test_the_longest_wait_counts_from_arrival() -> None:
    async with bench(max_wait_s=TINY_S) as b:
        results = [b.submit("a")]
        await b.dispatched("a")
        results.append(b.submit("b"))
        await settle()
        b.clock.now += 0.9 * TINY_S
        results.append(b.submit("c"))
        await settle()
        await b.dispatched("a")
        b.clock.now += 0.1 * TINY_S + 1e-6  # b's wait is over, c's is not
        await b.dispatched("a", "bc")
        assert b.closed == {"idle": 1, "max_wait": 1}
        b.model.finish()
        b.model.finish()
        await asyncio.gather(*results)


async def test_used_up_slack_closes_a_batch() -> None:
    async with bench(service_margin_s=HOUR_S - TINY_S) as b:
        results = [b.submit("a", timeout_s=HOUR_S)]
        await b.dispatched("a")
        results.append(b.submit("b", timeout_s=HOUR_S))
        await settle()
        await b.dispatched("a")
        b.clock.now += 2 * TINY_S
        await b.dispatched("a", "b")
        assert b.closed == {"idle": 1, "slack": 1}
        b.model.finish()
        b.model.finish()
        await asyncio.gather(*results)


async def test_no_more_batches_are_in_flight_than_credits() -> None:
    async with bench(max_batch_tokens=1, max_in_flight=3) as b:
        results = [b.submit(value) for value in "abcdefgh"]
        await b.dispatched("a", "b", "c")
        for _ in range(5):
            b.model.finish()
            await settle()
            assert len(b.model.running) == 3
        while b.model.running:
            b.model.finish()
        assert await asyncio.gather(*results) == list("ABCDEFGH")


async def test_draining_dispatches_without_waiting_for_company() -> None:
    async with bench() as b:
        results = [b.submit("a")]
        await b.dispatched("a")
        results.append(b.submit("b"))
        await settle()
        b.batcher.drain()
        await b.dispatched("a", "b")
        assert b.closed == {"idle": 1, "drain": 1}
        b.model.finish()
        b.model.finish()
        await asyncio.gather(*results)


async def test_groups_are_never_mixed() -> None:
    async with bench(max_batch_tokens=100, max_in_flight=1) as b:
        results = [b.submit("x")]
        await b.dispatched("x")
        results += [b.submit(value, group=int(value) % 3) for value in "0123456789"]
        await settle()
        for _ in range(4):
            b.model.finish()
            await settle()
        assert ["".join(batch) for batch in b.model.batches] == ["x", "0369", "147", "258"]
        await asyncio.gather(*results)


async def test_urgent_items_go_first() -> None:
    async with bench(max_batch_tokens=1, max_in_flight=1) as b:
        results = [b.submit("x")]
        await b.dispatched("x")
        for value, priority in (("a", 0.0), ("b", 0.5), ("c", 1.0)):
            results.append(b.submit(value, priority=priority))
        await settle()
        for _ in range(4):
            b.model.finish()
            await settle()
        assert ["".join(batch) for batch in b.model.batches] == ["x", "c", "b", "a"]
        await asyncio.gather(*results)


async def test_the_batch_is_told_its_latest_deadline() -> None:
    async with bench(max_in_flight=1) as b:
        results = [b.submit("x")]
        await b.dispatched("x")
        results += [b.submit("a", timeout_s=50.0), b.submit("b", timeout_s=70.0)]
        await settle()
        b.model.finish()
        await b.dispatched("x", "ab")
        assert b.model.deadlines[1] == b.clock.now + 70.0
        b.model.finish()
        await asyncio.gather(*results)


async def test_limits_may_change_while_serving() -> None:
    async with bench(max_batch_tokens=100, max_in_flight=1) as b:
        results = [b.submit(value) for value in "x"]
        await b.dispatched("x")
        results += [b.submit(value) for value in "abcd"]
        await settle()
        b.batcher.limits = BatchLimits(2, HOUR_S, 1)
        b.model.finish()
        await b.dispatched("x", "ab")
        b.model.finish()
        await b.dispatched("x", "ab", "cd")
        b.model.finish()
        assert len(await asyncio.gather(*results)) == 5


# What fails


@pytest.mark.parametrize("error", [InvalidTensorError("wrong"), OverloadedError("x", None, 2.0)])
async def test_what_execute_raises_fails_its_items_only(error: PimoeError) -> None:
    async with bench(max_in_flight=1) as b:
        first = b.submit("x")
        await b.dispatched("x")
        failing = [b.submit(value) for value in "ab"]
        await settle()
        b.model.finish()
        await b.dispatched("x", "ab")

        def fail(batch: list[str]) -> list[str]:
            raise error

        b.model.answer = fail
        b.model.finish()
        for result in failing:
            with pytest.raises(type(error)) as raised:
                await result
            assert raised.value is error
        assert await first == "X"
        b.model.answer = lambda batch: batch
        after = b.submit("c")
        await b.dispatched("x", "ab", "c")
        b.model.finish()
        assert await after == "c"


async def test_unknown_exceptions_do_not_leak_their_text(caplog: pytest.LogCaptureFixture) -> None:
    def fail(batch: list[str]) -> list[str]:
        raise ValueError("password hunter2")

    async with bench() as b:
        b.model.answer = fail
        result = b.submit("a")
        await b.dispatched("a")
        b.model.finish()
        with pytest.raises(PimoeError) as raised:
            await result
        assert type(raised.value) is PimoeError
        assert str(raised.value) == "the batch failed: ValueError"
        assert "hunter2" in caplog.text  # for the operator


@pytest.mark.parametrize("results", [[], ["A"], ["A", "B", "C"], None])
async def test_a_wrong_number_of_results_is_nobodys_result(results: Any) -> None:
    async with bench(max_in_flight=1) as b:
        first = b.submit("x")
        await b.dispatched("x")
        pair = [b.submit(value) for value in "ab"]
        await settle()
        b.model.finish()
        await b.dispatched("x", "ab")
        b.model.answer = lambda batch: results
        b.model.finish()
        for outcome in await asyncio.gather(*pair, return_exceptions=True):
            assert type(outcome) is PimoeError
        assert await first == "X"


async def test_a_deadline_ends_the_wait_in_the_queue_and_in_a_batch() -> None:
    async with bench(max_in_flight=1) as b:
        computing = b.submit("a", timeout_s=TINY_S)
        await b.dispatched("a")
        queued = b.submit("b", tokens=3, timeout_s=TINY_S)
        for result in (computing, queued):
            with pytest.raises(DeadlineExceededError):
                await result
        assert b.batcher.queue.tokens == 0
        b.model.finish()
        await b.dispatched("a")  # nothing was spent on the late one
        after = b.submit("c")
        await b.dispatched("a", "c")
        b.model.finish()
        assert await after == "C"


async def test_what_is_late_by_the_clock_is_failed_before_it_is_computed() -> None:
    async with bench(max_in_flight=1) as b:
        first = b.submit("a")
        await b.dispatched("a")
        late, in_time = b.submit("b", timeout_s=30.0), b.submit("c", timeout_s=300.0)
        await settle()
        b.clock.now += 100.0
        b.model.finish()
        await b.dispatched("a", "c")
        with pytest.raises(DeadlineExceededError, match="in the queue"):
            await late
        b.model.finish()
        assert await asyncio.gather(first, in_time) == ["A", "C"]
        assert b.batcher.statistics().queue.expired == 1


async def test_cancelling_frees_the_tokens_at_once() -> None:
    async with bench(max_in_flight=1, queue_limits=QueueLimits(max_tokens=10)) as b:
        first = b.submit("a")
        await b.dispatched("a")
        queued = b.submit("b", tokens=10)
        await settle()
        assert b.batcher.queue.tokens == 10
        queued.cancel()
        await asyncio.gather(queued, return_exceptions=True)
        assert b.batcher.queue.tokens == 0
        next_one = b.submit("c", tokens=10)
        await settle()
        b.model.finish()
        await b.dispatched("a", "c")
        b.model.finish()
        assert await asyncio.gather(first, next_one) == ["A", "C"]


async def test_cancelled_items_are_dropped_just_before_they_are_computed() -> None:
    async with bench(max_in_flight=1) as b:
        first = b.submit("x")
        await b.dispatched("x")
        results = [b.submit(value) for value in "abc"]
        await settle()
        b.model.finish()
        while b.batcher.statistics().batches < 2:  # noqa: ASYNC110 (to stop at the very moment)
            await asyncio.sleep(0)
        assert len(b.model.batches) == 1  # the second is formed, and not yet begun
        results[1].cancel()
        await b.dispatched("x", "ac")
        results[2].cancel()  # while it is computed: its result goes nowhere
        await settle()
        b.model.finish()
        outcomes = await asyncio.gather(first, *results, return_exceptions=True)
        assert outcomes[:2] == ["X", "A"]
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[2:])


async def test_a_full_queue_refuses_and_sheds() -> None:
    async with bench(max_in_flight=1, queue_limits=QueueLimits(max_tokens=4, retry_after_s=2.0)) as b:
        first = b.submit("x")
        await b.dispatched("x")
        waiting = b.submit("a", tokens=4)
        await settle()
        with pytest.raises(OverloadedError, match="full") as refused:
            await b.submit("b")
        assert refused.value.retry_after_s == 2.0
        urgent = b.submit("c", priority=1.0)
        with pytest.raises(OverloadedError, match="shed") as shed:
            await waiting
        assert shed.value.retry_after_s == 2.0
        b.model.finish()
        await b.dispatched("x", "c")
        b.model.finish()
        assert await asyncio.gather(first, urgent) == ["X", "C"]
        statistics = b.batcher.statistics().queue
        assert (statistics.refused, statistics.shed, statistics.cancelled) == (1, 1, 0)


# Closing


async def test_closing_fails_what_waits_and_what_runs() -> None:
    async with bench(max_in_flight=1) as b:
        results = [b.submit("x")]
        await b.dispatched("x")
        results += [b.submit(value) for value in "ab"]
        await settle()
        await b.batcher.close()
        for outcome in await within_patience(asyncio.gather(*results, return_exceptions=True)):
            assert isinstance(outcome, RequestCancelledError)
        assert b.model.running[0].cancelled()
        with pytest.raises(RequestCancelledError):
            await b.submit("late")


@pytest.mark.parametrize("turns", range(6))
async def test_closing_at_any_moment_leaves_nobody_waiting(turns: int) -> None:
    async with bench() as b:
        results = [b.submit(value) for value in "abcdef"]
        for _ in range(turns):  # a batch may be formed and not yet begun
            await asyncio.sleep(0)
        await b.batcher.close()
        for outcome in await within_patience(asyncio.gather(*results, return_exceptions=True)):
            assert isinstance(outcome, RequestCancelledError)


async def test_a_computation_that_cancels_itself_fails_its_items_only() -> None:
    def cancel(batch: list[str]) -> list[str]:
        raise asyncio.CancelledError

    async with bench() as b:
        b.model.answer = cancel
        result = b.submit("a")
        await b.dispatched("a")
        b.model.finish()
        with pytest.raises(RequestCancelledError):
            await result
        b.model.answer = lambda batch: batch
        after = b.submit("b")
        await b.dispatched("a", "b")
        b.model.finish()
        assert await after == "b"


async def test_what_was_submitted_before_the_start_is_served() -> None:
    model = Model()
    batcher: Batcher[str, str] = Batcher(model, BatchLimits(), QueueLimits())
    result = asyncio.create_task(batcher.submit("a", 1, 0.5, TIMEOUT_S))
    await settle()
    assert model.batches == []
    batcher.start()
    await eventually(lambda: model.running)
    model.finish()
    assert await result == "A"
    await batcher.close()


@pytest.mark.parametrize("seed", range(4))
async def test_every_item_has_exactly_one_outcome(seed: int) -> None:
    chance = random.Random(seed)
    computed: list[int] = []

    async def execute(batch: Sequence[int], deadline: float) -> Sequence[int]:
        computed.extend(batch)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if chance.random() < 0.2:
            raise InvalidTensorError("now and then")
        return [-value for value in batch]

    limits = BatchLimits(max_batch_tokens=20, max_wait_s=0.001, max_in_flight=2)
    batcher: Batcher[int, int] = Batcher(execute, limits, QueueLimits(max_tokens=150, max_items=40))
    batcher.start()
    tasks: list[asyncio.Task[int]] = []
    for value in range(1, 400):
        tokens, timeout_s = chance.randrange(1, 30), chance.choice([TIMEOUT_S, TIMEOUT_S, 0.001])
        call = batcher.submit(value, tokens, chance.random(), timeout_s, group=chance.randrange(3))
        tasks.append(asyncio.create_task(call))
        if chance.random() < 0.1:
            chance.choice(tasks).cancel()
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    outcomes = await within_patience(asyncio.gather(*tasks, return_exceptions=True))
    for value, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, int):
            assert outcome == -value
            assert computed.count(value) == 1
        else:
            assert isinstance(
                outcome, InvalidTensorError | OverloadedError | DeadlineExceededError | asyncio.CancelledError
            )
    assert sum(isinstance(outcome, int) for outcome in outcomes) > 20
    assert len(set(computed)) == len(computed)
    assert (len(batcher.queue), batcher.queue.tokens) == (0, 0)
    await eventually(lambda: batcher.statistics().in_flight == 0)
    await batcher.close()
