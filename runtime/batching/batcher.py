"""The batcher: a queue, a policy and credits around a function that computes batches."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import DeadlineExceededError, InvalidRequestError, PimoeError, RequestCancelledError
from ..histogram import TOKENS, Histogram
from .books import QueueStatistics
from .composer import Composer
from .downstream import Downstream, Flight
from .limits import QueueLimits
from .policy import BatchLimits, CloseReason, Load, decide, sort_key
from .queue import PriorityQueue, QueueItem
from .rates import DecayingRate

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Computed(NamedTuple, Generic[R]):
    """One batch's results, in the order of its values, where an error is the outcome of that item alone; and the
    tokens of its most loaded expert, on which its time depends."""

    results: Sequence[R | PimoeError]
    largest_expert_tokens: int = 0


# Computes one batch: values of one group and the latest of their deadlines (`loop.time()`).
Execute = Callable[[Sequence[T], float], Awaitable[Computed[R]]]


class BatcherStatistics(NamedTuple):
    """The queue, batches in flight, and since start: batches, tokens computed, batches by close reason and size;
    the latency model, the bound of batches that it or `AimdLimit` sets, and how busy downstream was lately."""

    queue: QueueStatistics
    in_flight: int
    batches: int
    tokens: int
    closed: dict[str, int]
    sizes: dict[str, Any]
    latency: dict[str, Any]
    max_batch_tokens: int
    utilisation: float

    def as_plain(self) -> dict[str, Any]:
        """Plain values for the status page."""
        return {**self._asdict(), "queue": self.queue._asdict()}


class _Entry(Generic[T, R]):
    """A value and the future its caller waits on; and the task of its batch, once it is in one."""

    def __init__(self, value: T, result: asyncio.Future[R]) -> None:
        self.value = value
        self.result = result
        self.batch: _Batch[T, R] | None = None

    def settle(self, result: R | PimoeError) -> None:
        if isinstance(result, PimoeError):
            self.fail(result)
        elif not self.result.done():
            self.result.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


_Item = QueueItem[_Entry[T, R]]


class _Batch(Generic[T, R]):
    """A batch that was dispatched."""

    def __init__(self, items: list[_Item[T, R]], flight: Flight) -> None:
        self.items = items
        self.flight = flight
        self.task: asyncio.Task[None] | None = None
        self._callers = len(items)

    def leave(self) -> None:
        """One of its callers goes, with or without a result: when all have, nobody needs it any more."""
        self._callers -= 1
        if self._callers == 0 and self.task is not None:
            self.task.cancel()


class Batcher(Generic[T, R]):
    """Event-driven: one timer, no polling. `start` it on the loop that calls `submit`.

    Args:
        execute: computes a batch. What it raises fails that batch's items, never the batcher.
        clock: monotonic seconds (asyncio's loops use the same one). Tests inject theirs.
        servers: see `Downstream`.
    """

    def __init__(
        self,
        execute: Execute[T, R],
        limits: BatchLimits,
        queue_limits: QueueLimits,
        clock: Callable[[], float] | None = None,
        servers: Callable[[], int] | None = None,
    ) -> None:
        self._limits = limits
        self.queue: PriorityQueue[_Entry[T, R]] = PriorityQueue(queue_limits)
        self.downstream = Downstream(limits.max_batch_tokens, servers)
        self.composer = Composer(self.queue, self.downstream, limits)
        self._execute = execute
        self._clock = clock or time.monotonic
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._loop_task: asyncio.Task[None] | None = None
        self._draining = self._closing = False
        self._batches = self._tokens = 0
        self._closed: collections.Counter[str] = collections.Counter()
        self._sizes = Histogram(TOKENS)
        self._arrivals = DecayingRate()

    @property
    def limits(self) -> BatchLimits:
        """The bounds; may be set while serving, and hold at once."""
        return self._limits

    @limits.setter
    def limits(self, limits: BatchLimits) -> None:
        self._limits = self.composer.limits = limits
        self._wake.set()

    def start(self) -> None:
        """Begin to form batches."""
        self._loop_task = asyncio.create_task(self._run(), name="batcher")

    @property
    def alive(self) -> bool:
        """Whether batches are formed; false when the loop has ended, as it must not."""
        return self._loop_task is not None and not self._loop_task.done()

    async def close(self) -> None:
        """Fail what waits and what comes, cancel what runs."""
        self._closing = True
        self.queue.drain(_shutting_down())
        tasks = [*self._running, *([self._loop_task] if self._loop_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drain(self) -> None:
        """Stop waiting for company: what is queued is dispatched as credits allow."""
        self._draining = True
        self._wake.set()

    def statistics(self) -> BatcherStatistics:
        """See `BatcherStatistics`."""
        return BatcherStatistics(
            queue=self.queue.statistics(),
            in_flight=len(self._running),
            batches=self._batches,
            tokens=self._tokens,
            closed=dict(self._closed),
            sizes=self._sizes.snapshot(),
            latency=self.downstream.latency.snapshot(),
            max_batch_tokens=self.composer.max_tokens(),
            utilisation=self.downstream.utilisation(self._clock()),
        )

    async def submit(self, value: T, tokens: int, priority: float, timeout_s: float, group: Hashable = None) -> R:
        """Queue one item and wait for its result. Cancelling the caller frees its place at once, and ends its
        batch when all callers of that have left.

        Raises:
            InvalidRequestError: `tokens` is not at least 1.
            OverloadedError: the queue is full, or too long for the item's time, or the item was shed for more
                important work.
            DeadlineExceededError: `timeout_s` ran out, or is too short for the item to be computed.
            RequestCancelledError: the batcher was closed.
            PimoeError: what `execute` raised.
        """
        if self._closing:
            raise _shutting_down()
        if tokens < 1:
            raise InvalidRequestError(f"{tokens} tokens; there must be at least one")
        entry, item = self._new_item(value, tokens, priority, timeout_s, group)
        if self.composer.is_hopeless(item):
            raise self.queue.refusal(item, "more waits before this request than can be done in its time")
        self.queue.push(item)
        self._arrivals.add(1, item.arrival)
        self._wake.set()
        timer = entry.result.get_loop().call_later(timeout_s, self._expire, item)
        try:
            return await entry.result
        finally:
            timer.cancel()
            self.queue.cancel(item)
            if not entry.result.cancel() and not entry.result.cancelled():
                entry.result.exception()  # seen, even if the caller was cancelled in the same instant
            if entry.batch is not None:
                entry.batch.leave()

    def _expire(self, item: _Item[T, R]) -> None:
        self.queue.expire(max(self._clock(), item.deadline))  # so that it is counted, and not as cancelled
        item.value.fail(DeadlineExceededError("the request's time ran out"))

    def _new_item(
        self, value: T, tokens: int, priority: float, timeout_s: float, group: Hashable
    ) -> tuple[_Entry[T, R], _Item[T, R]]:
        now = self._clock()
        deadline = now + timeout_s
        latency = self.downstream.latency
        entry: _Entry[T, R] = _Entry(value, asyncio.get_running_loop().create_future())
        item = QueueItem(
            value=entry,
            tokens=tokens,
            priority=priority,
            arrival=now,
            deadline=deadline,
            key=sort_key(self.queue.limits, self._limits, now, deadline, priority, latency.predict_s(tokens)),
            fail=entry.fail,
            group=group,
        )
        return entry, item

    async def _run(self) -> None:
        while True:
            wake_at = self._dispatch_ready()
            delay_s = None if math.isinf(wake_at) else max(0.0, wake_at - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._wake.wait()
            self._wake.clear()

    def _dispatch_ready(self) -> float:
        """Dispatch every batch that closes now; when to look again."""
        while True:
            now = self._clock()
            self.queue.expire(now)
            if len(self._running) >= self._limits.max_in_flight:
                return math.inf  # a completion wakes us; until then it would be formed in vain
            if (hold_until := self._hold_until(now)) > now:
                return hold_until
            batch, left_behind = self.composer.compose(now)
            if not batch:
                return math.inf
            view = self.composer.view(batch, left_behind, now)
            in_flight = len(self._running)
            load = self._load(view.tokens, now) if in_flight else None
            decision = decide(view, now, in_flight, self._limits, self._draining, load)
            if decision.reason is None:
                return decision.wake_at
            self._dispatch(batch, view.tokens, decision.reason, now)

    def _hold_until(self, now: float) -> float:
        """Batches are bound as late as downstream does not notice."""
        if self._draining or not self.queue.limits.prioritised:
            return now
        return self.downstream.hold_until(now)

    def _load(self, tokens: int, now: float) -> Load | None:
        if self._arrivals.age_s(now) < self._limits.max_wait_s:
            return None  # not even one wait's worth of arrivals has been seen
        downstream = self.downstream
        return Load(self._arrivals.per_s(now), downstream.utilisation(now), downstream.fixed_share(tokens))

    def _dispatch(self, items: list[_Item[T, R]], tokens: int, reason: CloseReason, now: float) -> None:
        self.queue.take(items, now)
        self._batches += 1
        self._closed[reason] += 1
        self._sizes.add(tokens)
        spare_s = min(item.deadline - item.arrival for item in items)
        batch = _Batch(items, self.downstream.dispatched(tokens, spare_s, now))
        for item in items:
            item.value.batch = batch
        batch.task = asyncio.create_task(self._compute(batch))
        self._running.add(batch.task)
        batch.task.add_done_callback(partial(self._completed, batch))

    def _completed(self, batch: _Batch[T, R], task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        now = self._clock()
        if task.cancelled():  # perhaps before it began
            self.downstream.abandoned(batch.flight, now)
            for item in batch.items:
                item.value.fail(_shutting_down())
        self.downstream.ended(batch.flight, now)
        self._wake.set()

    async def _compute(self, batch: _Batch[T, R]) -> None:
        items = [item for item in batch.items if not item.value.result.done()]
        if not items:
            return
        entries = [item.value for item in items]
        try:
            latest = max(item.deadline for item in items)
            tokens = sum(item.tokens for item in items)
            self._tokens += tokens
            results, largest = await self._execute([entry.value for entry in entries], latest)
            if len(results) != len(entries):  # before any is handed out: none is known to be its item's
                raise PimoeError(f"a batch of {len(entries)} items got {len(results)} results")
            for entry, result in zip(entries, results, strict=True):
                entry.settle(result)
            self.downstream.computed(batch.flight, tokens, largest, self._clock())
        except Exception as error:  # whatever the model raises is these items' outcome, never the batcher's
            if isinstance(error, DeadlineExceededError):
                self.downstream.abandoned(batch.flight, self._clock())
            if not isinstance(error, PimoeError):
                _log.error("a batch failed", exc_info=error)
                error = PimoeError(f"the batch failed: {type(error).__name__}")
            for entry in entries:
                entry.fail(error)


def _shutting_down() -> RequestCancelledError:
    return RequestCancelledError("the server is shutting down")
