"""Who runs next: from the queue, and of those that were preempted."""

from __future__ import annotations

from ..batching import LatencyModel, OverloadControl, PriorityQueue, QueueItem
from ..batching.classes import CLASSES
from .scheduler import Generation, Scheduler
from .stream import Stream

_SMOOTHING = 0.1


class Admission:
    """Moves requests from the queue to the scheduler.

    Args:
        latency: of steps.
        max_sequences: that run at once.
    """

    def __init__(
        self, queue: PriorityQueue[Stream], scheduler: Scheduler, latency: LatencyModel, max_sequences: int
    ) -> None:
        self._queue, self._scheduler, self._latency = queue, scheduler, latency
        self._max_sequences = max_sequences
        self._overload = OverloadControl(queue, lambda item: 1)
        self._held_s = 0.0  # how long sequences lately ran, smoothed

    def note_end(self, held_s: float) -> None:
        """A sequence ended that ran for so long."""
        self._held_s += (held_s - self._held_s) * (_SMOOTHING if self._held_s else 1.0)

    def is_hopeless(self, item: QueueItem[Stream]) -> bool:
        """Whether those that are served before an item surely hold all places for longer than it has: better told
        at once than after all its time."""
        if self._scheduler.has_seat(item.rank) or item.value.request.emitted:
            return False
        rounds_ahead = self._queue.items_above(item.rank - 1) // self._max_sequences
        return rounds_ahead * self._held_s > item.deadline - item.arrival

    def admit(self, now: float) -> list[Stream]:
        """Let run who fits, in this order: who was preempted goes on before anybody of its class or of a lower one
        begins, and before those of higher classes that came so much later that they would be served later, too.

        Returns:
            Those that begin.
        """
        self._queue.expire(now)
        entrants, begun = self._next_in_queue(now), list[Stream]()
        while True:
            back, item = self._scheduler.first_preempted(), entrants[0] if entrants else None
            if back is not None and (item is None or back.rank >= item.rank or back.key <= item.key):
                if self._scheduler.admit(back):
                    continue
                # Who takes a seat over from a lower class delays nobody who waits for a free one.
                if item is None or item.rank <= back.rank or self._free_seats():
                    return begun
            if item is None or not self._begin(item, now):
                return begun
            entrants.pop(0)
            if item.value.generation is not None:
                begun.append(item.value)

    def _free_seats(self) -> int:
        return self._max_sequences - len(self._scheduler.running)

    def _next_in_queue(self, now: float) -> list[QueueItem[Stream]]:
        room = self._free_seats()
        if not len(self._queue):
            return []
        if not room:
            return self._who_takes_over()
        first, left = self._queue.peek(room)
        backlog_s = len(self._queue) / self._max_sequences * self._held_s
        return self._overload.compose(first, left, room, now, self._held_s, backlog_s)

    def _who_takes_over(self) -> list[QueueItem[Stream]]:
        """All seats are taken: the first of the highest class that waits may have one of a lower class, also where
        a backlog of its own class or of lower ones comes before it by key and has to wait for a free seat."""
        if not self._queue.limits.prioritised:
            return []
        first = (self._queue.first_of_class(rank) for rank in reversed(CLASSES))
        item = next((item for item in first if item is not None), None)
        return [item] if item is not None and self._scheduler.has_seat(item.rank) else []

    def _begin(self, item: QueueItem[Stream], now: float) -> bool:
        """Whether the next one may be looked at: this one runs, or is given up."""
        stream = item.value
        # Kept for the next try: the hashes of a long prompt are not computed anew in every step.
        stream.candidate = stream.candidate or self._new_generation(item)
        tokens = self._scheduler.to_compute(stream.candidate)
        if self._scheduler.running and now + self._latency.least_s(tokens) > item.deadline:
            self._queue.drop_late([item])  # not even its first token would be in time
            return True
        if not self._scheduler.admit(stream.candidate):
            return False
        self._queue.take([item], now)
        stream.generation = stream.candidate
        stream.generation.admitted = now
        return True

    def _new_generation(self, item: QueueItem[Stream]) -> Generation:
        request = item.value.request
        return Generation(
            request=request,
            rank=item.rank if self._queue.limits.prioritised else 0,
            key=item.key,
            number=item.number,
            deadline=item.deadline,
            tokens=[*request.prompt_token_ids, *request.emitted],
        )
