"""The priority queue in front of a batcher or an engine: sorted by static keys, bounded in tokens."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeAlias, TypeVar

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
    """One waiting request; it is queued once.

    Attributes:
        key: virtual deadline; the smallest is served first.
        group: only items of one group share a batch (a tensor request's layer).
        fail: called with the error when the queue gives the item up (shed, or too late).
        waiting, number: the queue's own: whether the item is in it, and as which it came.
    """

    value: T
    tokens: int
    priority: float
    arrival: float
    deadline: float
    key: float
    fail: Callable[[PimoeError], None]
    group: Hashable = None
    waiting: bool = field(default=False, init=False)
    number: int = field(default=-1, init=False)


class QueueStatistics(NamedTuple):
    """What waits now, and how many were refused, shed, expired and cancelled since start."""

    items: int
    tokens: int
    refused: int
    shed: int
    expired: int
    cancelled: int


# Sorting key, tie breaker and item: no two compare equal, so that items themselves are never compared.
_Entry: TypeAlias = tuple[float, int, QueueItem[T]]


class PriorityQueue(Generic[T]):
    """Single-threaded; every method runs on the event loop's thread.

    Three orders over the same items: by key within each group, by deadline, by importance. An item that leaves
    frees its tokens at once. The two heaps lose its entries when they surface, or when most entries are left over.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._groups: dict[Hashable, list[_Entry[T]]] = {}  # sorted: batches are read off without taking them out
        self._by_deadline: list[_Entry[T]] = []  # a heap, as the next
        self._by_importance: list[_Entry[T]] = []
        self._numbers = itertools.count()
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
            OverloadedError: the queue is full of work that is at least as important; nothing was shed.
            ValueError: the item was queued before.
        """
        if item.number >= 0:
            raise ValueError("a queue item can be queued only once")
        for victim in self._make_room(item):
            self._leave(victim)
            self._shed += 1
            victim.fail(OverloadedError("shed for more important work", retry_after_s=self.limits.retry_after_s))
        item.waiting, item.number = True, next(self._numbers)
        self._items += 1
        self._tokens += item.tokens
        insort(self._groups.setdefault(item.group, []), (item.key, item.number, item))
        heapq.heappush(self._by_deadline, (item.deadline, item.number, item))
        heapq.heappush(self._by_importance, (item.priority, -item.number, item))

    def _make_room(self, item: QueueItem[T]) -> list[QueueItem[T]]:
        """Who must go for `item`. Decided before anyone goes: none is shed for an item that is refused."""
        items, tokens = self._items, self._tokens
        entries: list[_Entry[T]] = []
        try:
            # An item larger than the whole queue comes in when nothing else waits: it never could otherwise.
            while items >= self.limits.max_items or (items and tokens + item.tokens > self.limits.max_tokens):
                victim = self._first(self._by_importance)
                if victim is None or victim.priority >= item.priority:
                    self._refused += 1
                    raise OverloadedError("the queue is full", retry_after_s=self.limits.retry_after_s)
                entries.append(heapq.heappop(self._by_importance))
                items -= 1
                tokens -= victim.tokens
        finally:
            for entry in entries:
                heapq.heappush(self._by_importance, entry)
        return [entry[2] for entry in entries]

    def cancel(self, item: QueueItem[T]) -> None:
        """Take a waiting item out; nothing happens when it is gone already."""
        if item.waiting:
            self._leave(item)
            self._cancelled += 1

    def head(self) -> QueueItem[T] | None:
        """The item that is served next, still waiting."""
        return min(entries[0] for entries in self._groups.values())[2] if self._groups else None

    def pop(self) -> QueueItem[T]:
        """Take the head out.

        Raises:
            IndexError: nothing waits.
        """
        item = self.head()
        if item is None:
            raise IndexError("the queue is empty")
        self._leave(item)
        return item

    def expire(self, now: float) -> None:
        """Fail what can no longer make its deadline, before anything is spent on it."""
        while (item := self._first(self._by_deadline)) is not None and item.deadline <= now:
            self._leave(item)
            self._expired += 1
            item.fail(DeadlineExceededError("the request's time ran out in the queue"))

    def peek_batch(self, max_tokens: int) -> tuple[list[QueueItem[T]], bool]:
        """The items of the head's group, in order, that fit into `max_tokens`, and whether one was left behind
        only for lack of room. A head larger than `max_tokens` comes alone. Nothing is taken out."""
        head = self.head()
        batch: list[QueueItem[T]] = []
        tokens = 0
        for _, _, item in self._groups[head.group] if head is not None else ():
            if batch and tokens + item.tokens > max_tokens:
                return batch, True  # no small one passes a big one by: big items must not starve
            batch.append(item)
            tokens += item.tokens
        return batch, False

    def take(self, batch: list[QueueItem[T]]) -> None:
        """Take these items out: they are being served."""
        for item in batch:
            self._leave(item)

    def drain(self, error: PimoeError) -> None:
        """Fail everything that waits."""
        while (item := self.head()) is not None:
            self._leave(item)
            item.fail(error)

    @staticmethod
    def _first(heap: list[_Entry[T]]) -> QueueItem[T] | None:
        while heap and not heap[0][2].waiting:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def _leave(self, item: QueueItem[T]) -> None:
        item.waiting = False
        self._items -= 1
        self._tokens -= item.tokens
        group = self._groups[item.group]
        del group[bisect_left(group, (item.key, item.number))]
        if not group:
            del self._groups[item.group]
        for heap in (self._by_deadline, self._by_importance):
            if len(heap) > 64 + 2 * self._items:
                heap[:] = [entry for entry in heap if entry[2].waiting]
                heapq.heapify(heap)
