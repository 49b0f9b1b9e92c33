"""The priority queue in front of a batcher or an engine: sorted by static keys, bounded in tokens by class."""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from ..errors import DeadlineExceededError, OverloadedError, PimoeError
from .books import ClassBooks, QueueStatistics
from .classes import CLASSES, class_of
from .limits import QueueLimits
from .rates import DrainRate

T = TypeVar("T")

_LONGEST_RETRY_S = 60.0
_MOST_MISSES = 32  # items looked past for smaller ones to fill a batch


@dataclass(slots=True, eq=False)
class QueueItem(Generic[T]):
    """One waiting request; it is queued once.

    Attributes:
        key: virtual deadline; the smallest is served first.
        group: only items of one group share a batch (a tensor request's layer).
        fail: called with the error when the queue gives the item up (shed, or too late).
        rank: its class, see `class_of`.
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
    rank: int = field(default=0, init=False)
    waiting: bool = field(default=False, init=False)
    number: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self.rank = class_of(self.priority)


# Sorting key, tie breaker and item: no two compare equal, so that items themselves are never compared.
_Entry: TypeAlias = tuple[float, int, QueueItem[T]]


class PriorityQueue(Generic[T]):
    """Single-threaded; every method runs on the event loop's thread.

    Four orders over the same items: by key within each group and each class, by deadline, by importance. An item
    that leaves frees its tokens at once. Heaps lose its entries when they surface, or when most are left over.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.drain_rate = DrainRate()
        self._groups: dict[Hashable, list[_Entry[T]]] = {}  # sorted: batches are read off without taking them out
        self._by_deadline: list[_Entry[T]] = []  # a heap, as the next two
        self._by_class: list[list[_Entry[T]]] = [[] for _ in CLASSES]
        self._by_importance: list[_Entry[T]] = []
        self._numbers = itertools.count()
        self._items = self._tokens = 0
        self.times_emptied = 0
        self._books = [ClassBooks() for _ in CLASSES]

    def __len__(self) -> int:
        return self._items

    @property
    def tokens(self) -> int:
        """Tokens of all waiting items."""
        return self._tokens

    def items_above(self, rank: int) -> int:
        """Items that wait in the classes above one."""
        return sum(books.items for books in self._books[rank + 1 :])

    def tokens_ahead(self, rank: int) -> int:
        """Tokens that wait in a class and those above it: what is served before a newcomer."""
        return sum(books.tokens for books in self._books[rank:]) if self.limits.prioritised else self._tokens

    def first_of_class(self, rank: int) -> QueueItem[T] | None:
        """The item of a class that comes first by key, in whatever group."""
        return self._first(self._by_class[rank])

    def statistics(self) -> QueueStatistics:
        """See `QueueStatistics`."""
        return QueueStatistics.of(self._books, self.drain_rate.tokens_per_s)

    def push(self, item: QueueItem[T]) -> None:
        """Queue an item; when there is no room, the newest of the lowest class go first.

        Raises:
            OverloadedError: the item's class, or the queue with work at least as important, is full; nothing was
                shed.
            ValueError: the item was queued before, or has no tokens.
        """
        if item.number >= 0 or item.tokens < 1:
            raise ValueError("a queue item has at least one token and can be queued only once")
        given_up = [(victim, self._give_up(victim)) for victim in self._make_room(item)]
        item.waiting, item.number = True, next(self._numbers)
        self._items += 1
        self._tokens += item.tokens
        self._books[item.rank].came(item.tokens)
        insort(self._groups.setdefault(item.group, []), (item.key, item.number, item))
        heapq.heappush(self._by_deadline, (item.deadline, item.number, item))
        heapq.heappush(self._by_class[item.rank], (item.key, item.number, item))
        heapq.heappush(self._by_importance, (item.rank, -item.number, item))
        for victim, error in given_up:  # told when the books are right: who is told may queue again
            victim.fail(error)

    def _make_room(self, item: QueueItem[T]) -> list[QueueItem[T]]:
        """Who must go for `item`. Decided before anyone goes: none is shed for an item that is refused."""
        books = self._books[item.rank]
        if not self.limits.class_has_room(item.rank, books.items, books.tokens, item.tokens):
            raise self._refusal(item, "requests of this priority")
        items, tokens = self._items, self._tokens
        entries: list[_Entry[T]] = []
        try:
            # An item larger than the whole queue comes in when nothing else waits: it never could otherwise.
            while items >= self.limits.max_items or (items and tokens + item.tokens > self.limits.max_tokens):
                victim = self._first(self._by_importance)
                if victim is None or not self.limits.prioritised or victim.rank >= item.rank:
                    raise self._refusal(item, "work at least as important")
                entries.append(heapq.heappop(self._by_importance))
                items -= 1
                tokens -= victim.tokens
        finally:
            for entry in entries:
                heapq.heappush(self._by_importance, entry)
        return [entry[2] for entry in entries]

    def _refusal(self, item: QueueItem[T], full_of: str) -> OverloadedError:
        return self.refusal(item, f"the queue is full of {full_of}")

    def refusal(self, item: QueueItem[T], why: str) -> OverloadedError:
        """The error for an item that is not taken in, counted."""
        self._books[item.rank].refused += 1
        return OverloadedError(why, retry_after_s=self.retry_after_s(item))

    def retry_after_s(self, item: QueueItem[T]) -> float:
        """When there may be room for an item like this: the backlog that is served before it over the measured
        rate, or the configured guess while none is known."""
        rate = self.drain_rate.tokens_per_s
        if rate is None:
            return self.limits.retry_after_s
        backlog = self.tokens_ahead(item.rank) + item.tokens
        return min(max(backlog / rate, 0.001), _LONGEST_RETRY_S)

    def shed(self, item: QueueItem[T]) -> None:
        """Give a waiting item up for more important work, or because the queue would not get shorter; nothing
        happens when it is gone already."""
        if item.waiting:
            item.fail(self._give_up(item))

    def _give_up(self, item: QueueItem[T]) -> OverloadedError:
        error = OverloadedError("shed under overload", retry_after_s=self.retry_after_s(item))
        self._leave(item)
        self._books[item.rank].shed += 1
        return error

    def cancel(self, item: QueueItem[T]) -> None:
        """Take a waiting item out; nothing happens when it is gone already."""
        if item.waiting:
            self._leave(item)
            self._books[item.rank].cancelled += 1

    def head(self) -> QueueItem[T] | None:
        """The item that is served next, still waiting."""
        return min(entries[0] for entries in self._groups.values())[2] if self._groups else None

    def pop(self, now: float | None = None) -> QueueItem[T]:
        """Take the head out to be served; see `take`.

        Raises:
            IndexError: nothing waits.
        """
        item = self.head()
        if item is None:
            raise IndexError("the queue is empty")
        self.take([item], now)
        return item

    def expire(self, now: float) -> None:
        """Fail what can no longer make its deadline, before anything is spent on it."""
        late: list[QueueItem[T]] = []
        while (item := self._first(self._by_deadline)) is not None and item.deadline <= now:
            self._leave(item)
            late.append(item)
        self._fail_late(late)

    def drop_late(self, items: list[QueueItem[T]]) -> None:
        """Fail waiting items that would not be done in time if they were begun."""
        for item in items:
            self._leave(item)
        self._fail_late(items)

    def _fail_late(self, items: list[QueueItem[T]]) -> None:
        for item in items:
            self._books[item.rank].expired += 1
            item.fail(DeadlineExceededError("the request's time ran out in the queue"))

    def peek_batch(
        self,
        max_tokens: int,
        fits: Callable[[int, float], bool] | None = None,
        now: float = math.inf,
        head: QueueItem[T] | None = None,
    ) -> tuple[list[QueueItem[T]], QueueItem[T] | None]:
        """The items of `head`'s group, in order, that go together, and the first that was left behind only for
        lack of room. A head larger than `max_tokens` comes alone. Nothing is taken out.

        Where an item does not fit that is not late at `now`, smaller ones behind it fill the room that it could
        not use. It keeps its key and soon is the head, so it does not starve; one that is late is not passed by.

        Args:
            fits: of a batch's tokens and its earliest deadline, whether it would be done in time; None: yes.
            head: any item of the group; None: the one that comes first of all.
        """
        head = head or self.head()
        batch: list[QueueItem[T]] = []
        left: QueueItem[T] | None = None
        tokens, deadline, misses = 0, math.inf, 0
        for key, _, item in self._groups[head.group] if head is not None else ():
            total, earliest = tokens + item.tokens, min(deadline, item.deadline)
            if not batch or (total <= max_tokens and (fits is None or fits(total, earliest))):
                batch.append(item)
                tokens, deadline = total, earliest
                continue
            left, misses = left or item, misses + 1
            if key < now or misses == _MOST_MISSES or tokens >= max_tokens:
                break
        return batch, left

    def peek(self, count: int) -> tuple[list[QueueItem[T]], QueueItem[T] | None]:
        """The first `count` items of the head's group, and the one after them."""
        head = self.head()
        entries = self._groups[head.group][: count + 1] if head is not None else []
        items = [entry[2] for entry in entries]
        return items[:count], items[count] if len(items) > count else None

    def overdue(self, now: float, group: Hashable) -> Iterator[QueueItem[T]]:
        """Items of a group that are past their virtual deadlines, in order."""
        for key, _, item in self._groups.get(group, ()):
            if key >= now:
                return
            yield item

    def groups(self) -> list[Hashable]:
        """The groups of which something waits."""
        return list(self._groups)

    def take(self, batch: list[QueueItem[T]], now: float | None = None) -> None:
        """Take these items out: they are being served, as of `now` (None: waits and rates are not counted)."""
        if now is not None:  # before they leave: an empty queue ends what is measured
            self.drain_rate.left(sum(item.tokens for item in batch), self._items > len(batch), now)
        for item in batch:
            self._leave(item)
            if now is not None:
                self._books[item.rank].served(now - item.arrival)

    def drain(self, error: PimoeError) -> None:
        """Fail everything that waits."""
        entries = sorted(itertools.chain.from_iterable(self._groups.values()))
        for _, _, item in entries:
            self._leave(item)
        for _, _, item in entries:
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
        self._books[item.rank].went(item.tokens)
        group = self._groups[item.group]
        del group[bisect_left(group, (item.key, item.number))]
        if not group:
            del self._groups[item.group]
        if not self._items:
            self.times_emptied += 1
            self.drain_rate.emptied()
        for heap in (self._by_deadline, self._by_importance, *self._by_class):
            if len(heap) > 64 + 2 * self._items:
                heap[:] = [entry for entry in heap if entry[2].waiting]
                heapq.heapify(heap)
