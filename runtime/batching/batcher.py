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
from typing import Generic, NamedTuple, TypeVar

from ..errors import DeadlineExceededError, PimoeError, RequestCancelledError
from .policy import BatchLimits, CloseReason, QueueView, decide, virtual_deadline
from .queue import PriorityQueue, QueueItem, QueueLimits, QueueStatistics

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

# Computes one batch: values of one group and the latest of their deadlines (`loop.time()`).
Execute = Callable[[Sequence[T], float], Awaitable[Sequence[R]]]


class BatcherStatistics(NamedTuple):
    """The queue, batches in flight, and since start: batches, tokens in them, batches by close reason."""

    queue: QueueStatistics
    in_flight: int
    batches: int
    tokens: int
    closed: dict[str, int]


class _Entry(Generic[T, R]):
    """A value and the future its caller waits on."""

    def __init__(self, value: T, result: asyncio.Future[R]) -> None:
        self.value = value
        self.result = result

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class Batcher(Generic[T, R]):
    """Event-driven: one timer, no polling. `start` it on the loop that calls `submit`.

    Args:
        execute: computes a batch. What it raises fails that batch's items, never the batcher.
        clock: monotonic seconds (asyncio's loops use the same one). Tests inject theirs.
    """

    def __init__(
        self,
        execute: Execute[T, R],
        limits: BatchLimits,
        queue_limits: QueueLimits,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.limits = limits
        self.queue: PriorityQueue[_Entry[T, R]] = PriorityQueue(queue_limits)
        self._execute = execute
        self._clock = clock or time.monotonic
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._loop_task: asyncio.Task[None] | None = None
        self._draining = self._closing = False
        self._batches = self._tokens = 0
        self._closed: collections.Counter[str] = collections.Counter()

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
            self.queue.statistics(), len(self._running), self._batches, self._tokens, dict(self._closed)
        )

    async def submit(self, value: T, tokens: int, priority: float, timeout_s: float, group: Hashable = None) -> R:
        """Queue one item and wait for its result. Cancelling the caller frees its place at once.

        Raises:
            OverloadedError: the queue is full, or the item was shed for more important work.
            DeadlineExceededError: `timeout_s` ran out.
            RequestCancelledError: the batcher was closed.
            PimoeError: what `execute` raised.
        """
        if self._closing:
            raise _shutting_down()
        now = self._clock()
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        entry = _Entry(value, result)
        item = QueueItem(
            value=entry,
            tokens=tokens,
            priority=priority,
            arrival=now,
            deadline=now + timeout_s,
            key=virtual_deadline(now, now + timeout_s, priority, self.limits),
            fail=entry.fail,
            group=group,
        )
        self.queue.push(item)
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await result
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out") from None
        finally:
            self.queue.cancel(item)

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
            if len(self._running) >= self.limits.max_in_flight:
                return math.inf  # a completion wakes us; until then it would be formed in vain
            batch, left_behind = self.queue.peek_batch(self.limits.max_batch_tokens)
            if not batch:
                return math.inf
            view = QueueView(
                tokens=sum(item.tokens for item in batch),
                next_does_not_fit=left_behind,
                oldest_arrival=min(item.arrival for item in batch),
                latest_start=min(item.deadline for item in batch) - self.limits.service_margin_s,
            )
            decision = decide(view, now, len(self._running), self.limits, self._draining)
            if decision.reason is None:
                return decision.wake_at
            self._dispatch(batch, view.tokens, decision.reason)

    def _dispatch(self, batch: list[QueueItem[_Entry[T, R]]], tokens: int, reason: CloseReason) -> None:
        self.queue.take(batch)
        self._batches += 1
        self._tokens += tokens
        self._closed[reason] += 1
        task = asyncio.create_task(self._compute(batch))
        self._running.add(task)
        task.add_done_callback(partial(self._completed, batch))

    def _completed(self, batch: list[QueueItem[_Entry[T, R]]], task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()
        if task.cancelled():  # perhaps before it began
            for item in batch:
                item.value.fail(_shutting_down())

    async def _compute(self, batch: list[QueueItem[_Entry[T, R]]]) -> None:
        entries = [item.value for item in batch if not item.value.result.done()]
        if not entries:
            return
        try:
            results = await self._execute([e.value for e in entries], max(item.deadline for item in batch))
            if len(results) != len(entries):  # before any is handed out: none is known to be its item's
                raise PimoeError(f"a batch of {len(entries)} items got {len(results)} results")
            for entry, result in zip(entries, results, strict=True):
                if not entry.result.done():
                    entry.result.set_result(result)
        except Exception as error:  # whatever the model raises is these items' outcome, never the batcher's
            if not isinstance(error, PimoeError):
                _log.error("a batch failed", exc_info=error)
                error = PimoeError(f"the batch failed: {type(error).__name__}")
            for entry in entries:
                entry.fail(error)


def _shutting_down() -> RequestCancelledError:
    return RequestCancelledError("the server is shutting down")
