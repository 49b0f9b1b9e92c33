"""Who is served, and who is given up, when more comes than can be done.

While every item is served by its virtual deadline there is nothing to decide here. Once items are *late*, keys
alone would let a backlog of patient work, which grows old, compete with what is urgent and new. So among those:

- the more important class goes first, but each other class keeps `min_share` of the room;
- an item that would be passed by although it is late by more than `target_delay_s`, or half of its time, is shed
  instead: nothing waits longer than its patience plus that while anything that arrived later runs;
- a queue whose items stay later than `target_delay_s` for `standing_s` is a standing queue: it delays everybody
  and gains nothing. What is later than that goes (Nichols and Jacobson, Controlling Queue Delay, ACM Queue 2012).
  Measured against virtual deadlines rather than arrivals, so that patient work may wait as long as it said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .classes import CLASSES
from .queue import PriorityQueue, QueueItem

T = TypeVar("T")

# A delay of a few services is what any busy queue has, however long a service takes.
_TARGET_SERVICES = 8

# Looks for a standing queue in the time after which it counts as one. Each goes over all that is late.
_LOOKS = 16


@dataclass(frozen=True, slots=True)
class _Lateness:
    """When an item is too late."""

    now: float
    target_s: float
    backlog_s: float

    def is_beyond_the_bound(self, item: QueueItem[Any]) -> bool:
        """Whether nothing may pass an item by any more."""
        return self.now - item.key > self.target_s

    def gives_up(self, item: QueueItem[Any]) -> bool:
        """Whether an item is too late to be kept for its own sake: by the target, or by half of all the time it
        had, since what waits until it is nearly out of time is of little use to anybody. But not where all that
        waits is done sooner: then it is late for a standstill that is over."""
        limit_s = min(self.target_s, (item.deadline - item.arrival) / 2)
        return self.now - item.key > limit_s and self.backlog_s > limit_s


class OverloadControl(Generic[T]):
    """Composes what is served next out of what is late. One per queue.

    Args:
        size: how much of the room an item takes: its tokens, or 1 where room is counted in items.
    """

    def __init__(self, queue: PriorityQueue[T], size: Callable[[QueueItem[T]], int]) -> None:
        self._queue = queue
        self._size = size
        self._credits = [0.0 for _ in CLASSES]
        self._standing_since = math.inf
        self._times_emptied = 0
        self._looked_at = -math.inf

    def target_s(self, service_s: float) -> float:
        """How late an item may be before it is given up for others, where a service takes `service_s`."""
        return max(self._queue.limits.target_delay_s, _TARGET_SERVICES * service_s)

    def calm(self) -> None:
        """There is no more than is served at once: whatever stands later has not stood since before."""
        self._standing_since = math.inf

    def compose(
        self,
        batch: list[QueueItem[T]],
        left: QueueItem[T] | None,
        room: int,
        now: float,
        service_s: float,
        backlog_s: float = math.inf,
    ) -> list[QueueItem[T]]:
        """What is served next instead of `batch`, which is what comes first by keys; sheds what has to go.

        Args:
            left: the first item of the batch's group that did not fit.
            room: of a batch, in the unit of `size`.
            service_s: how long serving a full batch takes.
            backlog_s: how long serving all that waits takes. When that is soon, nobody is shed: after a standstill
                everything is late and nothing is wrong.
        """
        if not self._queue.limits.prioritised:
            return batch
        lateness = _Lateness(now, self.target_s(service_s), backlog_s)
        if left is not None and left.key < now and self._is_contested(batch):
            batch = self._make_way(batch, list(self._queue.overdue(now, left.group)), room, lateness)
        self._cut_standing(batch, lateness)
        return batch

    def next_head(self, room: int, now: float) -> QueueItem[T] | None:
        """An item of the group that is served next: by key, or, of several groups, the one with the most important
        item that is late. Lower classes keep their share there, too, in whole batches."""
        head = self._queue.head()
        if head is None or not self._queue.limits.prioritised or len(self._queue.groups()) == 1:
            return head
        urgent = next(
            (
                first
                for rank in reversed(range(head.rank + 1, len(CLASSES)))
                if (first := self._queue.first_of_class(rank)) is not None and first.key < now
            ),
            head,
        )
        if urgent.group == head.group:
            return head
        self._credits[head.rank] += self._queue.limits.min_share * room
        if self._credits[head.rank] < room:
            return urgent
        self._credits[head.rank] -= room
        return head

    def _is_contested(self, batch: list[QueueItem[T]]) -> bool:
        """Whether something more important than the least in `batch` waits outside it: looked up in the books, so
        that a long queue of one class costs nothing."""
        least = min(item.rank for item in batch)
        return self._queue.items_above(least) > sum(item.rank > least for item in batch)

    def _make_way(
        self, batch: list[QueueItem[T]], late: list[QueueItem[T]], room: int, lateness: _Lateness
    ) -> list[QueueItem[T]]:
        chosen = self._by_importance(late, room)
        taken = {item.number for item in chosen}
        if not taken - {item.number for item in batch}:
            return batch  # what waits outside is of another group, or not late
        last_key = max(item.key for item in chosen)
        passed = [item for item in late if item.key < last_key and item.number not in taken]
        given_up = [item for item in passed if lateness.gives_up(item)]
        if sum(map(lateness.is_beyond_the_bound, passed)) > sum(map(lateness.is_beyond_the_bound, given_up)):
            return batch  # who may not be passed by, and need not go, goes first
        for item in given_up:
            self._queue.shed(item)
        return sorted(chosen, key=lambda item: (item.key, item.number))

    def _by_importance(self, late: list[QueueItem[T]], room: int) -> list[QueueItem[T]]:
        # Sorting is stable: within a class the order of keys remains.
        ordered = sorted(late, key=lambda item: -item.rank)
        # What is most important has its place before shares are given: they fill what it leaves.
        chosen = self._shares(ordered, room)
        taken = {item.number for item in chosen}
        room -= sum(map(self._size, chosen))
        for item in ordered:
            if item.number not in taken and (not chosen or self._size(item) <= room):
                chosen.append(item)
                room -= self._size(item)
            if room <= 0:
                break
        return chosen

    def _shares(self, ordered: list[QueueItem[T]], room: int) -> list[QueueItem[T]]:
        """The oldest of each class but the first, as far as its share goes and the first item of all leaves room.
        What a class could not use it keeps for the next time; once that comes to a whole batch, it goes first."""
        first = min(self._size(ordered[0]), room)
        chosen: list[QueueItem[T]] = []
        used = 0
        for rank in sorted({item.rank for item in ordered} - {ordered[0].rank}):
            credit = min(self._credits[rank] + self._queue.limits.min_share * room, float(room))
            free = room if credit >= room else room - first
            for item in ordered:
                if item.rank != rank:
                    continue
                size = min(self._size(item), room)
                if size > credit or used + size > free:
                    break
                chosen.append(item)
                credit -= size
                used += size
            self._credits[rank] = credit
        return chosen

    def _cut_standing(self, batch: list[QueueItem[T]], lateness: _Lateness) -> None:
        queue, now = self._queue, lateness.now
        if now - self._looked_at < queue.limits.standing_s / _LOOKS:
            return
        self._looked_at = now
        taken = {item.number for item in batch}
        behind = [
            item
            for group in queue.groups()
            for item in queue.overdue(now, group)
            if item.number not in taken and lateness.gives_up(item)
        ]
        if not behind or self._times_emptied != queue.times_emptied:
            self._standing_since = math.inf  # what stood when it was last looked at is gone
            self._times_emptied = queue.times_emptied
        if not behind:
            return
        self._standing_since = min(self._standing_since, now)
        if now - self._standing_since < queue.limits.standing_s:
            return
        for item in sorted(behind, key=lambda item: (item.rank, -item.number)):
            queue.shed(item)
