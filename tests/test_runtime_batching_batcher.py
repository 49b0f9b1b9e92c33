"""The batcher: when it dispatches, and that every item gets exactly one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any

import pytest
from pimoe.runtime.batching import Batcher, BatchLimits, Computed, QueueLimits
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidRequestError,
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
        self.answer: Callable[[list[str]], Sequence[str | PimoeError]] = lambda batch: [
            value.upper() for value in batch
        ]

    async def __call__(self, batch: Sequence[str], deadline: float) -> Computed[str]:
        self.batches.append(list(batch))
        self.deadlines.append(deadline)
        gate = asyncio.get_running_loop().create_future()
        self.running.append(gate)
        await gate
        return Computed(self.answer(list(batch)))

    def finish(self, index: int = 0) -> None:
        """Let the batch at `index` among the running ones go."""
        self.running.pop(index).set_result(None)


class Bench:
    """A batcher under test."""

    def __init__(
        self,
        limits: BatchLimits,
        queue_limits: QueueLimits,
        clock: Clock,
        servers: Callable[[], int] | None,
    ) -> None:
        self.model = Model()
        self.clock = clock
        self.batcher: Batcher[str, str] = Batcher(self.model, limits, queue_limits, clock, servers)

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
    servers: Callable[[], int] | None = None,
    **limits: Any,
) -> AsyncIterator[Bench]:
    made = Bench(
        BatchLimits(max_batch_tokens, max_wait_s, max_in_flight, **limits),
        queue_limits or QueueLimits(),
        Clock(),
        servers,
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
    # A tenth of its time is kept back, while nothing is known of how long batches take.
    async with bench(service_margin_s=0.9 * HOUR_S - TINY_S) as b:
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


async def test_a_result_that_is_an_error_fails_its_item_only() -> None:
    refused = InvalidTensorError("wrong")
    async with bench(max_in_flight=1) as b:
        first = b.submit("x")
        await b.dispatched("x")
        results = [b.submit(value) for value in "abc"]
        await settle()
        b.model.finish()
        await b.dispatched("x", "abc")
        b.model.answer = lambda batch: [refused if value == "b" else value for value in batch]
        b.model.finish()
        assert await asyncio.gather(first, *results, return_exceptions=True) == ["X", "a", refused, "c"]
        assert b.batcher.statistics().latency["samples"] == 2  # the batch was computed


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
        first = b.submit("x")
        await b.dispatched("x")
        computing, beside = b.submit("a", timeout_s=TINY_S), b.submit("b")
        await settle()
        b.model.finish()
        await b.dispatched("x", "ab")
        queued = b.submit("c", tokens=3, timeout_s=TINY_S)
        for result in (computing, queued):
            with pytest.raises(DeadlineExceededError):
                await result
        assert b.batcher.queue.tokens == 0
        b.model.finish()  # the batch went on: one of its callers is still there
        assert await asyncio.gather(first, beside) == ["X", "B"]
        await b.dispatched("x", "ab")  # nothing was spent on the late one
        after = b.submit("d")
        await b.dispatched("x", "ab", "d")
        b.model.finish()
        assert await after == "D"


async def test_a_batch_ends_when_all_its_callers_have_left() -> None:
    async with bench(max_in_flight=1) as b:
        first = b.submit("x")
        await b.dispatched("x")
        late, cancelled = b.submit("a", timeout_s=TINY_S), b.submit("b")
        await settle()
        b.model.finish()
        await b.dispatched("x", "ab")
        with pytest.raises(DeadlineExceededError):
            await late
        assert not b.model.running[0].done()
        cancelled.cancel()
        await eventually(lambda: b.model.running[0].cancelled())
        b.model.running.clear()
        after = b.submit("c")
        await b.dispatched("x", "ab", "c")  # its credit is free again
        b.model.finish()
        assert await asyncio.gather(first, after) == ["X", "C"]


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


# What was learnt


async def teach(b: Bench, seconds_per_token: float = 1.0) -> None:
    """Let batches run that take so long each."""
    for size in [1, 2, 3, 4] * 6:
        result = b.submit("t", tokens=size, timeout_s=HOUR_S)
        await eventually(lambda: b.model.running)
        b.clock.now += size * seconds_per_token
        b.model.finish()
        await result
    b.model.batches.clear()


async def test_a_batch_is_no_larger_than_its_deadlines_allow() -> None:
    async with bench(max_in_flight=1) as b:
        await teach(b)
        assert b.batcher.downstream.latency.predict_s(4) == pytest.approx(4.0, rel=0.01)
        results = [b.submit("x", timeout_s=HOUR_S)]
        await b.dispatched("x")
        results += [b.submit(value, timeout_s=4.2) for value in "abcd"]
        await settle()
        b.clock.now += 1.0
        b.model.finish()
        await b.dispatched("x", "abc")  # three seconds are left, and two tenths
        b.clock.now += 3.0
        b.model.finish()
        outcomes = await asyncio.gather(*results, return_exceptions=True)
        assert outcomes[:4] == ["X", "A", "B", "C"]
        assert isinstance(outcomes[4], DeadlineExceededError)


async def test_no_deadline_makes_a_batch_smaller_than_the_least() -> None:
    async with bench(max_in_flight=1, min_batch_tokens=4) as b:
        await teach_full(b)
        results = [b.submit("x", tokens=4, timeout_s=HOUR_S)]
        await b.dispatched("x")
        results += [b.submit(value, timeout_s=6.0) for value in "abcd"]
        await settle()
        b.clock.now += 4.0
        b.model.finish()
        await b.dispatched("x", "abcd")
        b.model.finish()
        await asyncio.gather(*results)


async def teach_full(b: Bench) -> None:
    """As `teach`, where smaller batches would wait for company."""
    b.batcher.limits, least = BatchLimits(4, HOUR_S, 1), b.batcher.limits
    await teach(b)
    b.batcher.limits = least


async def test_batches_are_bound_as_late_as_downstream_allows() -> None:
    async with bench(max_in_flight=2, servers=lambda: 1) as b:
        await teach(b)
        results = [b.submit("x", tokens=4, timeout_s=HOUR_S)]
        await b.dispatched("x")
        results.append(b.submit("a", tokens=4, timeout_s=HOUR_S))
        await settle()
        await b.dispatched("x")  # it would only wait there
        results.append(b.submit("u", tokens=4, priority=1.0, timeout_s=HOUR_S))
        await settle()
        b.clock.now += 3.999
        b.batcher.limits = b.batcher.limits  # looks again, as it would by its timer
        await settle()
        await b.dispatched("x", "u")  # what came later and is more urgent goes first
        b.clock.now += 0.001
        b.model.finish()
        await settle()
        await b.dispatched("x", "u")
        b.batcher.drain()  # then nothing is held
        await b.dispatched("x", "u", "a")
        b.model.finish()
        b.model.finish()
        assert await asyncio.gather(*results) == ["X", "A", "U"]


async def test_nobody_queues_behind_more_than_can_be_done_in_their_time() -> None:
    async with bench(max_in_flight=1) as b:
        await teach(b)
        results = [b.submit("x", tokens=4, timeout_s=HOUR_S)]
        await b.dispatched("x")
        results += [b.submit(value, tokens=4, timeout_s=HOUR_S) for value in "ab"]
        await settle()
        with pytest.raises(OverloadedError, match="more waits before this request") as refused:
            await b.submit("c", timeout_s=7.0)  # eight seconds of the others
        assert (refused.value.retry_after_s or 0) > 0
        assert b.batcher.statistics().queue.refused == 1
        results.append(b.submit("d", timeout_s=20.0))
        results.append(b.submit("e", priority=1.0, timeout_s=7.0))  # goes first
        await settle()
        assert len(b.batcher.queue) == 4
        b.batcher.drain()
        while not all(result.done() for result in results):
            while b.model.running:
                b.model.finish()
            await settle()
        assert await asyncio.gather(*results) == ["X", "A", "B", "D", "E"]


async def test_what_cannot_be_done_in_time_is_not_begun_while_others_wait() -> None:
    async with bench(max_in_flight=1) as b:
        await teach(b)
        results = [b.submit("x", timeout_s=HOUR_S)]
        await b.dispatched("x")
        late = b.submit("a", tokens=2, timeout_s=3.0)
        results += [b.submit(value, tokens=2, timeout_s=HOUR_S) for value in "bcd"]
        await settle()
        b.clock.now += 1.0
        b.model.finish()
        await b.dispatched("x", "bc")  # with a, it would take four seconds, of which a has two
        with pytest.raises(DeadlineExceededError, match="in the queue"):
            await late
        assert b.batcher.statistics().queue.expired == 1
        b.model.finish()
        await b.dispatched("x", "bc", "d")
        b.model.finish()
        assert await asyncio.gather(*results) == ["X", "B", "C", "D"]


async def test_an_idle_model_tries_what_it_expects_to_be_late() -> None:
    async with bench(max_in_flight=1) as b:
        await teach(b)
        tried = b.submit("a", tokens=4, timeout_s=3.0)  # it has taken four seconds
        await b.dispatched("a")
        b.model.finish()
        assert await tried == "A"
        backlog = [b.submit(value, tokens=4, timeout_s=3.0) for value in "bcd"]
        for batches in (["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]):
            await b.dispatched(*batches)
            b.model.finish()
        assert await asyncio.gather(*backlog) == ["B", "C", "D"]
        assert b.batcher.statistics().queue.expired == 0


async def test_of_two_servers_the_third_batch_waits_for_the_first_to_end() -> None:
    async with bench(max_in_flight=3, max_wait_s=0.0, servers=lambda: 2) as b:
        await teach(b)
        results = [b.submit(value, tokens=4, timeout_s=HOUR_S) for value in "xy"]
        await b.dispatched("x", "y")  # the second is not held
        results.append(b.submit("a", tokens=4, timeout_s=HOUR_S))
        await settle()
        await b.dispatched("x", "y")
        b.clock.now += 3.999
        b.batcher.limits = b.batcher.limits  # looks again, as it would by its timer
        await b.dispatched("x", "y", "a")
        while b.model.running:
            b.model.finish()
        assert await asyncio.gather(*results) == ["X", "Y", "A"]


async def test_where_servers_are_not_known_no_batch_is_held() -> None:
    async with bench(max_in_flight=3, max_wait_s=0.0) as b:
        await teach(b)
        results = [b.submit(value, tokens=4, timeout_s=HOUR_S) for value in "xya"]
        await b.dispatched("x", "y", "a")
        while b.model.running:
            b.model.finish()
        assert await asyncio.gather(*results) == ["X", "Y", "A"]


@pytest.mark.parametrize(("timeout_s", "batches"), [(3.5, ["u", "ab"]), (HOUR_S, ["ua", "b"])])
async def test_a_batch_leaves_out_what_would_make_its_most_important_item_late(
    timeout_s: float, batches: list[str]
) -> None:
    async with bench(max_in_flight=1) as b:
        await teach(b)
        results = [b.submit("x", timeout_s=HOUR_S)]
        await b.dispatched("x")
        results.append(b.submit("u", tokens=2, priority=1.0, timeout_s=timeout_s))
        results += [b.submit(value, tokens=2, priority=0.0, timeout_s=HOUR_S) for value in "ab"]
        await settle()
        b.clock.now += 1.0
        b.model.finish()
        await b.dispatched("x", batches[0])
        b.clock.now += float(2 * len(batches[0]))
        b.model.finish()
        await b.dispatched("x", *batches)
        b.model.finish()
        assert await asyncio.gather(*results) == ["X", "U", "A", "B"]


async def test_nothing_is_left_out_for_what_is_late_anyway() -> None:
    async with bench(max_in_flight=1) as b:
        await teach(b)
        results = [b.submit("x", timeout_s=HOUR_S)]
        await b.dispatched("x")
        hopeless = b.submit("u", tokens=2, priority=1.0, timeout_s=2.0)
        results += [b.submit(value, tokens=2, priority=0.0, timeout_s=HOUR_S) for value in "ab"]
        await settle()
        b.clock.now += 1.0
        b.model.finish()
        await b.dispatched("x", "ab")
        with pytest.raises(DeadlineExceededError, match="in the queue"):
            await hopeless
        b.model.finish()
        assert await asyncio.gather(*results) == ["X", "A", "B"]


async def test_missed_deadlines_make_batches_smaller_until_they_are_met() -> None:
    async with bench(max_batch_tokens=16, max_in_flight=1) as b:
        for expected in (8, 4):
            late = b.submit("a", timeout_s=HOUR_S)
            await eventually(lambda: b.model.running)
            b.clock.now += HOUR_S + 1.0
            b.model.finish()
            assert await late == "A"  # by a clock that it does not know
            await settle()
            assert b.batcher.statistics().max_batch_tokens == expected
        for expected in (5, 6, 7):
            met = b.submit("a")
            await eventually(lambda: b.model.running)
            b.model.finish()
            await met
            await settle()
            assert b.batcher.statistics().max_batch_tokens == expected


@pytest.mark.parametrize("fate", ["everybody has left", "its time ran out downstream", "it failed"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_batch_that_took_too_long_makes_batches_smaller_without_an_answer(fate: str, late: bool) -> None:
    def fail(batch: list[str]) -> list[str]:
        raise InvalidTensorError("wrong") if fate == "it failed" else DeadlineExceededError("too late")

    async with bench(max_batch_tokens=16, max_in_flight=1) as b:
        b.model.answer = fail
        result = b.submit("a")
        await b.dispatched("a")
        b.clock.now += TIMEOUT_S + 1.0 if late else 0.0
        if fate == "everybody has left":
            result.cancel()
        else:
            b.model.finish()
        await asyncio.gather(result, return_exceptions=True)
        await eventually(lambda: b.batcher.statistics().in_flight == 0)
        b.model.running.clear()
        smaller = late and fate != "it failed"  # of how long a failure took nothing is learnt
        assert b.batcher.statistics().max_batch_tokens == (8 if smaller else 16)
        assert b.batcher.downstream.latency.samples == smaller


async def test_nobody_lingers_where_nobody_comes() -> None:
    async with bench(max_wait_s=1.0) as b:
        results = [b.submit("a")]
        await b.dispatched("a")
        b.clock.now += 10.0  # two requests in ten seconds
        results.append(b.submit("b"))
        await b.dispatched("a", "b")
        assert b.closed == {"idle": 2}
        b.model.finish()
        b.model.finish()
        await asyncio.gather(*results)


async def test_small_batches_wait_for_company_although_the_model_is_idle() -> None:
    async with bench(min_batch_tokens=2) as b:
        results = [b.submit("a")]
        await settle()
        assert b.model.batches == []
        results.append(b.submit("b"))
        await b.dispatched("ab")
        b.model.finish()
        assert await asyncio.gather(*results) == ["A", "B"]


async def test_a_time_that_ran_out_in_the_queue_is_counted_as_such() -> None:
    model = Model()
    batcher: Batcher[str, str] = Batcher(model, BatchLimits(max_in_flight=1), QueueLimits())
    batcher.start()
    first = asyncio.create_task(batcher.submit("a", 1, 0.5, TIMEOUT_S))
    await eventually(lambda: model.running)
    with pytest.raises(DeadlineExceededError):
        await batcher.submit("b", 1, 0.5, TINY_S)
    statistics = batcher.statistics().queue
    assert (statistics.expired, statistics.cancelled) == (1, 0)
    model.finish()
    assert await first == "A"
    await batcher.close()


async def test_statistics_are_plain() -> None:
    async with bench(max_in_flight=1) as b:
        await teach(b)
        waiting = [b.submit("b")]
        await b.dispatched("b")
        waiting.append(b.submit("a"))
        await settle()
        plain = json.loads(json.dumps(b.batcher.statistics().as_plain()))
        assert (plain["in_flight"], plain["batches"], plain["queue"]["items"]) == (1, 25, 1)
        assert plain["queue"]["classes"]["default"]["items"] == 1
        assert plain["latency"]["trusted"] is True
        assert 0.9 < plain["utilisation"] <= 1.0
        assert plain["sizes"]["sum"] == plain["tokens"] == 61
        b.model.finish()
        await b.dispatched("b", "a")
        b.model.finish()
        await asyncio.gather(*waiting)


# Nothing hangs, whatever goes wrong and whenever


@pytest.mark.parametrize("tokens", [0, -1])
async def test_an_item_without_tokens_is_refused(tokens: int) -> None:
    async with bench() as b:
        with pytest.raises(InvalidRequestError, match="at least one"):
            await b.submit("a", tokens=tokens)
        assert b.batcher.statistics().queue[:6] == (0,) * 6
        await still_serves(b)


async def test_a_priority_that_is_no_number_is_refused() -> None:
    async with bench() as b:
        with pytest.raises(ValueError, match="NaN"):
            await b.submit("a", priority=math.nan)
        assert b.batcher.statistics().queue[:6] == (0,) * 6
        await still_serves(b)


async def still_serves(b: Bench) -> None:
    """The batcher is as good as new."""
    assert b.batcher.alive
    assert (len(b.batcher.queue), b.batcher.queue.tokens) == (0, 0)
    b.model.running = [gate for gate in b.model.running if not gate.done()]
    before = len(b.model.batches)
    b.model.answer = lambda batch: [value.upper() for value in batch]
    result = b.submit("z")
    await eventually(lambda: len(b.model.batches) > before)
    while b.model.running:
        b.model.finish()
    assert await within_patience(result) == "Z"
    await eventually(lambda: b.batcher.statistics().in_flight == 0)


COLLATIONS: dict[str, Any] = {
    "raises": lambda batch, deadline: 1 / 0,
    "gives nothing": lambda batch, deadline: None,
    "is no coroutine": lambda batch, deadline: Computed(batch),
}


@pytest.mark.parametrize("way", list(COLLATIONS))
async def test_a_collation_that_fails_fails_its_items_only(way: str) -> None:
    async with bench(max_in_flight=1) as b:
        execute, b.batcher._execute = b.batcher._execute, COLLATIONS[way]
        outcomes = await within_patience(asyncio.gather(*map(b.submit, "abc"), return_exceptions=True))
        assert [type(outcome) for outcome in outcomes] == [PimoeError] * 3
        assert all("the batch failed: " in str(outcome) for outcome in outcomes)
        b.batcher._execute = execute
        await still_serves(b)


@pytest.mark.parametrize("answer", [None, 5, (), ("A",), (["A"],), (["A"], 1, 2), (None, 1), (["A", "B"], 1)])
async def test_an_answer_of_another_shape_fails_its_items_only(answer: Any) -> None:
    async def execute(batch: Sequence[str], deadline: float) -> Any:
        await asyncio.sleep(0)
        return answer

    async with bench(max_in_flight=1) as b:
        good, b.batcher._execute = b.batcher._execute, execute
        outcome = await within_patience(asyncio.gather(b.submit("a"), return_exceptions=True))
        assert [type(each) for each in outcome] == [PimoeError]
        b.batcher._execute = good
        await still_serves(b)


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("alone", [True, False])
async def test_a_caller_may_leave_at_any_moment(turns: int, alone: bool) -> None:
    async with bench(max_in_flight=1) as b:
        leaving = b.submit("a")
        others = [] if alone else [b.submit("b")]
        for turn in range(turns):
            if turn == 6:
                while b.model.running:
                    b.model.finish()
            await asyncio.sleep(0)
        leaving.cancel()
        await settle()
        for gate in b.model.running:
            if not gate.done():
                gate.set_result(None)
        outcomes = await within_patience(asyncio.gather(leaving, *others, return_exceptions=True))
        assert outcomes[0] == "A" or isinstance(outcomes[0], asyncio.CancelledError)
        assert outcomes[1:] == [] if alone else outcomes[1:] == ["B"]
        await still_serves(b)


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("fails", [True, False])
async def test_a_batch_may_be_cancelled_at_any_moment(turns: int, fails: bool) -> None:
    def fail(batch: list[str]) -> list[str]:
        raise InvalidTensorError("wrong")

    async with bench(max_in_flight=1) as b:
        if fails:
            b.model.answer = fail
        results = [b.submit(value) for value in "ab"]
        await eventually(lambda: b.batcher.statistics().batches)
        (task,) = b.batcher._running
        for turn in range(turns):
            if turn == 3:
                b.model.finish()
            await asyncio.sleep(0)
        task.cancel()
        outcomes = await within_patience(asyncio.gather(*results, return_exceptions=True))
        assert outcomes == ["A", "B"] or all(
            isinstance(outcome, RequestCancelledError | InvalidTensorError) for outcome in outcomes
        )
        await still_serves(b)


@pytest.mark.parametrize("turns", range(6))
async def test_closing_may_itself_be_cancelled(turns: int) -> None:
    async with bench(max_in_flight=1) as b:
        results = [b.submit(value) for value in "abcdef"]
        await eventually(lambda: b.model.running)
        closing = asyncio.create_task(b.batcher.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        if turns:
            for outcome in await within_patience(asyncio.gather(*results, return_exceptions=True)):
                assert isinstance(outcome, RequestCancelledError)
            await eventually(lambda: b.batcher.statistics().in_flight == 0)
        else:  # it had not begun
            await b.batcher.close()
            await within_patience(asyncio.gather(*results, return_exceptions=True))


async def test_a_model_that_is_slow_to_be_cancelled_is_waited_for() -> None:
    ended = []

    async def execute(batch: Sequence[str], deadline: float) -> Computed[str]:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            ended.append(batch)
        return Computed(batch)

    async with bench(max_in_flight=1) as b:
        b.batcher._execute = execute
        result = b.submit("a")
        await eventually(lambda: b.batcher.statistics().in_flight)
        await settle()
        await b.batcher.close()
        assert ended == [["a"]]
        with pytest.raises(RequestCancelledError):
            await result


async def test_a_model_that_will_not_be_cancelled_gives_its_results_to_nobody() -> None:
    gate = asyncio.Event()

    async def execute(batch: Sequence[str], deadline: float) -> Computed[str]:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        await gate.wait()
        return Computed(batch)

    async with bench(max_in_flight=1) as b:
        good, b.batcher._execute = b.batcher._execute, execute
        result = b.submit("a")
        await eventually(lambda: b.batcher.statistics().in_flight)
        await settle()
        result.cancel()
        await settle()
        assert b.batcher.statistics().in_flight == 1  # its credit is not free
        gate.set()
        await eventually(lambda: b.batcher.statistics().in_flight == 0)
        b.batcher._execute = good
        await still_serves(b)


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

    async def execute(batch: Sequence[int], deadline: float) -> Computed[int]:
        computed.extend(batch)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if chance.random() < 0.2:
            raise InvalidTensorError("now and then")
        return Computed([-value for value in batch])

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
