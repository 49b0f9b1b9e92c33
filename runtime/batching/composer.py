"""What goes into the next batch: order, overload, deadlines and the expected time together. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from .downstream import Downstream
from .overload import OverloadControl
from .policy import BatchLimits, QueueView
from .queue import PriorityQueue, QueueItem

T = TypeVar("T")

_UNSURE = 0.1  # of a request's time, kept back for its service while nothing is known of how long that takes


class Composer(Generic[T]):
    """Composes the batches of one queue for what lies behind it.

    Attributes:
        limits: may be set while serving.
    """

    def __init__(self, queue: PriorityQueue[T], downstream: Downstream, limits: BatchLimits) -> None:
        self.limits = limits
        self._queue = queue
        self._downstream = downstream
        self._overload = OverloadControl(queue, lambda item: item.tokens)

    def compose(self, now: float) -> tuple[list[QueueItem[T]], bool]:
        """The batch that would be taken now, empty when nothing waits, and whether something stayed behind for
        lack of room. What has to be given up for it is."""
        max_tokens = self.max_tokens()
        while True:
            head = self._overload.next_head(max_tokens, now)
            if not self.is_backlogged():
                batch, left = self._queue.peek_batch(max_tokens, self._in_time(now, max_tokens), now, head)
                self._overload.calm()
                return batch, left is not None
            batch, left = self._queue.peek_batch(max_tokens, now=now, head=head)
            service_s = self._downstream.batch_s(max_tokens)
            backlog_s = self._queue.tokens / max_tokens * service_s
            batch = self._overload.compose(batch, left, max_tokens, now, service_s, backlog_s)
            fitting = self._for_the_most_important(batch, now, now - self._overload.target_s(service_s))
            if not (late := self._late_in(fitting, now)):
                return fitting, left is not None or len(fitting) < len(batch)
            self._queue.drop_late(late)

    def view(self, batch: list[QueueItem[T]], left_behind: bool, now: float) -> QueueView:
        """The batch as `decide` sees it."""
        tokens = sum(item.tokens for item in batch)
        needed_s = self._needed_s(now, tokens)
        return QueueView(
            tokens=tokens,
            next_does_not_fit=left_behind or tokens >= self.max_tokens(),
            oldest_arrival=min(item.arrival for item in batch),
            latest_start=min(self._latest_start(item, needed_s) for item in batch),
        )

    def is_hopeless(self, item: QueueItem[T]) -> bool:
        """Whether what is served before a newcomer surely takes longer than it has: better told at once than after
        all its time. By the least that full batches take, since a rate measured during a standstill would turn all
        away."""
        if not self.is_backlogged() or self._downstream.is_idle:
            return False
        full_s = self._downstream.latency.least_s(self.max_tokens())
        batches_ahead = self._queue.tokens_ahead(item.rank) // self.max_tokens()
        return item.arrival + batches_ahead * full_s > item.deadline

    def is_backlogged(self) -> bool:
        """Whether more waits than a batch holds."""
        return self._queue.limits.prioritised and self._queue.tokens > self.max_tokens()

    def max_tokens(self) -> int:
        """The bound of a batch as of now."""
        if not self._queue.limits.prioritised:
            return self.limits.max_batch_tokens
        return self._downstream.max_tokens(self.limits)

    def _for_the_most_important(
        self, batch: list[QueueItem[T]], now: float, too_late: float
    ) -> list[QueueItem[T]]:
        """The batch without what would make its most important items late; but with what may not be passed by,
        whose key is before `too_late`."""
        latency = self._downstream.latency
        most = max(item.rank for item in batch)
        start = self._downstream.free_at(now) + self.limits.service_margin_s
        main = [item for item in batch if item.rank == most or item.key < too_late]
        saved = [
            item.deadline
            for item in main
            if item.rank == most and start + latency.least_s(item.tokens) <= item.deadline
        ]
        if len(main) == len(batch) or not saved or not latency.trusted:
            return batch
        stays = {item.number for item in main}
        tokens = sum(item.tokens for item in main)
        room = max(tokens, latency.tokens_within(min(saved) - start))
        fitting = []
        for item in batch:
            if item.number in stays:
                fitting.append(item)
            elif tokens + item.tokens <= room:
                tokens += item.tokens
                fitting.append(item)
        return fitting

    def _late_in(self, batch: list[QueueItem[T]], now: float) -> list[QueueItem[T]]:
        """What could make its deadline only in a smaller batch: while more waits than one holds, to shrink batches
        for the latest is to lose the throughput that all others need (early drop: Shen et al., Nexus, SOSP 19).
        With nothing in flight a batch runs, whatever is expected of it: so wrong expectations are mended."""
        seconds = self._downstream.latency.least_s(sum(item.tokens for item in batch))
        ends = self._downstream.free_at(now) + seconds + self.limits.service_margin_s
        late = [item for item in batch if item.deadline < ends]
        return [] if len(late) == len(batch) and self._downstream.is_idle else late

    def _in_time(self, now: float, max_tokens: int) -> Callable[[int, float], bool] | None:
        """Tells of a batch's tokens and its earliest deadline whether it would be done by then, dispatched now."""
        if not self._queue.limits.prioritised:
            return None
        # Asked for every item: mostly there is time for a full batch, and a smaller one takes no longer.
        full_s, least = self._needed_s(now, max_tokens), self.limits.min_batch_tokens

        def fits(tokens: int, deadline: float) -> bool:
            left_s = deadline - now
            return full_s <= left_s or tokens <= least or self._needed_s(now, tokens) <= left_s

        return fits

    def _needed_s(self, now: float, tokens: int) -> float:
        """How long before its deadline a batch must be dispatched."""
        waits_s = self._downstream.free_at(now) - now
        return waits_s + self._downstream.latency.predict_s(tokens) + self.limits.service_margin_s

    def _latest_start(self, item: QueueItem[T], needed_s: float) -> float:
        """When a batch that lingers must go for an item to be in time, with something to spare for what is not
        known: a timer that is late, or how long a batch takes at all."""
        trusted = self._downstream.latency.trusted
        unsure_s = self._downstream.spare_s if trusted else _UNSURE * (item.deadline - item.arrival)
        return item.deadline - needed_s - unsure_s
