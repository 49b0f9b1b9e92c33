"""The priority queue in front of a batcher or an engine: static keys in a heap, bounded in tokens."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from ..errors import ConfigurationError, DeadlineExceededError, OverloadedError, PimoeError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait.

    Attributes:
        max_tokens: of all waiting items together.
        max_items: however small they are.
        retry_after_s: what a refused client is told while no rate is known.
    """

    max_tokens: int = 262_144
    max_items: int = 8192
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"queue.{name} is {getattr(self, name)}; it must be above 0", name)


@dataclass(slots=True, eq=False)
class QueueItem(Generic[T]):
    """One waiting request.

    Attributes:
        key: virtual deadline; the smallest is served first.
        group: only items of one group share a batch (a tensor request's layer).
        fail: called with the error when the queue gives the item up (shed, or too late).
    """

    value: T
    tokens: int
    priority: float
    arrival: float
    deadline: float
    key: float
    fail: Callable[[PimoeError], None]
    group: Hashable = None
    waiting: bool = field(default=True, init=False)


class QueueStatistics(NamedTuple):
    """What waits now, and how many were refused, shed, expired and cancelled since start."""

    items: int
    tokens: int
    refused: int
    shed: int
    expired: int
    cancelled: int


class PriorityQueue(Generic[T]):
    """Single-threaded; every method runs on the event loop's thread.

    Cancelled items leave at once and free their tokens; their heap entries go when they surface, and are swept
    when they become the majority.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._heap: list[tuple[float, int, QueueItem[T]]] = []
        self._sequence = itertools.count()
        self._items = self._tokens = 0
        self._refused = self._shed = self._expired = self._cancelled = 0

    def __len__(self) -> int:
        return self._items

    @property
    def tokens(self) -> int:
        """Tokens of all waiting items."""
        return self._tokens

    def statistics(self) -> QueueStatistics:
        """See `QueueStatistics`."""
        return QueueStatistics(
            self._items, self._tokens, self._refused, self._shed, self._expired, self._cancelled
        )

    def push(self, item: QueueItem[T]) -> None:
        """Queue an item; when there is no room, the newest of the lowest priority go first.

        Raises:
            OverloadedError: the queue is full of work that is at least as important.
        """
        while self._is_over(item):
            victim = self._least_important()
            if victim is None or victim.priority >= item.priority:
                self._refused += 1
                raise OverloadedError("the queue is full", retry_after_s=self.limits.retry_after_s)
            self._leave(victim)
            self._shed += 1
            victim.fail(OverloadedError("shed for more important work", retry_after_s=self.limits.retry_after_s))
        self._items += 1
        self._tokens += item.tokens
        heapq.heappush(self._heap, (item.key, next(self._sequence), item))

    def _is_over(self, item: QueueItem[T]) -> bool:
        # An item larger than the whole queue is let in when nothing else waits: it could never enter otherwise.
        over_tokens = self._tokens + item.tokens > self.limits.max_tokens and self._items > 0
        return over_tokens or self._items >= self.limits.max_items

    def _least_important(self) -> QueueItem[T] | None:
        waiting = [entry for entry in self._heap if entry[2].waiting]
        if not waiting:
            return None
        return min(waiting, key=lambda entry: (entry[2].priority, -entry[1]))[2]

    def cancel(self, item: QueueItem[T]) -> None:
        """Take a waiting item out; nothing happens when it is gone already."""
        if item.waiting:
            self._leave(item)
            self._cancelled += 1

    def head(self) -> QueueItem[T] | None:
        """The item that is served next, still waiting."""
        while self._heap and not self._heap[0][2].waiting:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> QueueItem[T]:
        """Take the head out.

        Raises:
            IndexError: nothing waits.
        """
        item = self.head()
        if item is None:
            raise IndexError("the queue is empty")
        heapq.heappop(self._heap)
        self._leave(item)
        return item

    def expire(self, now: float) -> None:
        """Fail what can no longer make its deadline, before anything is spent on it."""
        late = [entry[2] for entry in self._heap if entry[2].waiting and entry[2].deadline <= now]
        for item in late:
            self._leave(item)
            self._expired += 1
            item.fail(DeadlineExceededError("the request's time ran out in the queue"))

    def peek_batch(self, max_tokens: int) -> tuple[list[QueueItem[T]], bool]:
        """The items of the head's group, in order, that fit into `max_tokens`, and whether one was left behind
        only for lack of room. A head larger than `max_tokens` comes alone. Nothing is taken out."""
        head = self.head()
        if head is None:
            return [], False
        batch: list[QueueItem[T]] = []
        seen: list[tuple[float, int, QueueItem[T]]] = []
        tokens, left_behind = 0, False
        while self._heap and not left_behind:
            seen.append(heapq.heappop(self._heap))
            item = seen[-1][2]
            if not item.waiting or item.group != head.group:
                continue
            # No small one passes a big one by: big items must not starve.
            left_behind = bool(batch) and tokens + item.tokens > max_tokens
            if not left_behind:
                batch.append(item)
                tokens += item.tokens
        for entry in seen:
            if entry[2].waiting:
                heapq.heappush(self._heap, entry)
        return batch, left_behind

    def take(self, batch: list[QueueItem[T]]) -> None:
        """Take these items out: they are being served."""
        for item in batch:
            self._leave(item)

    def drain(self, error: PimoeError) -> None:
        """Fail everything that waits."""
        while (item := self.head()) is not None:
            self.take([item])
            item.fail(error)

    def _leave(self, item: QueueItem[T]) -> None:
        item.waiting = False
        self._items -= 1
        self._tokens -= item.tokens
        if len(self._heap) > 64 and len(self._heap) > 2 * self._items:
            self._heap = [entry for entry in self._heap if entry[2].waiting]
            heapq.heapify(self._heap)
