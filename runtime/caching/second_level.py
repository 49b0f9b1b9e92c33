"""A second level of the result cache, shared by gateways. Here is what one must do, and the parts that any would
need: a circuit breaker, a queue of writes behind the answers, and counts. `redis_level` is the one there is.

A second level fails open. Whatever is wrong with it (away, slow, corrupt) is a miss with a reason, never an error
of the request, and never a wait longer than the lookup's deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

from .entry import CachedAnswer
from .result_cache import EntryTags

MissReason: TypeAlias = Literal[
    "absent",  # not there, or expired
    "stale",  # of before a flush
    "version",  # of another schema of entries
    "corrupt",  # bytes that are no entry, or no answer to this request
    "undecryptable",  # of another encryption key, tenant or cache key, or not encrypted at all
    "too_large",
    "timeout",
    "unavailable",
    "refused",  # the server answered with an error, or holds something of a foreign type there
    "busy",  # all connections are in use
    "open",  # the circuit breaker was open: the server was not asked
]
DropReason: TypeAlias = Literal[
    "full", "too_large", "timeout", "unavailable", "refused", "busy", "open", "flushed"
]
MISS_REASONS: tuple[MissReason, ...] = get_args(MissReason)
DROP_REASONS: tuple[DropReason, ...] = get_args(DropReason)


class Found(NamedTuple):
    """What a lookup gave.

    Attributes:
        answer: None for a miss.
        remaining_s: how long the store will keep the answer.
        ticket: to be given to `put` with the answer that is computed instead; None: it would not be stored.
    """

    answer: CachedAnswer | None = None
    remaining_s: float = 0.0
    ticket: bytes | None = None


class SecondLevelStatistics(NamedTuple):
    """Counts since start; `pending`, `pending_bytes` and `breaker_open` (0 or 1) are of now.

    Attributes:
        misses: by `MissReason`, every reason there, as in `dropped`.
        written: answers stored.
        dropped: answers not stored, by `DropReason`.
        breaker_opened: how often the server was given up for a while.
    """

    hits: int
    misses: dict[str, int]
    written: int
    dropped: dict[str, int]
    pending: int
    pending_bytes: int
    read_bytes: int
    written_bytes: int
    flushes: int
    breaker_open: int
    breaker_opened: int


class SecondLevel(Protocol):
    """A store of answers that outlives one gateway's memory. Nothing but `flush` raises."""

    async def get(self, key: bytes, tags: EntryTags, fits: Callable[[CachedAnswer], bool]) -> Found:
        """The answer under a key, if it is whole and `fits` takes it."""
        ...

    def put(self, key: bytes, tags: EntryTags, answer: CachedAnswer, size_bytes: int, ticket: bytes) -> None:
        """Store later, or never; returns at once."""
        ...

    async def flush(self, model: str | None = None, tenant: str | None = None) -> int:
        """Make the entries of a model, of a tenant, or of both (None: of any) invalid for every gateway.

        What is put with a ticket of before is never given, either.

        Returns:
            How many were deleted.

        Raises:
            UnavailableError: the store did not answer; entries may be valid still.
        """
        ...

    def forget(self, model: str | None = None, tenant: str | None = None) -> None:
        """Drop what waits to be stored, of that model or tenant."""
        ...

    async def close(self) -> None:
        """Give up what waits and close connections."""
        ...

    def statistics(self) -> SecondLevelStatistics:
        """See `SecondLevelStatistics`."""
        ...


@dataclass(slots=True)
class Breaker:
    """After `threshold` failures in a row, one try every `retry_s` and no more, until one succeeds.

    Args:
        clock: monotonic seconds.
    """

    threshold: int
    retry_s: float
    clock: Callable[[], float] = time.monotonic
    opened: int = 0
    _failures: int = 0
    _next_try: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the server is given up for now."""
        return self._failures >= self.threshold

    def allows(self) -> bool:
        """Whether to try now. Taking the place of the one probe does not bind it: a probe of which nothing is ever
        heard (its request was cancelled) is followed by the next."""
        if not self.is_open:
            return True
        if self.clock() < self._next_try:
            return False
        self._next_try = self.clock() + self.retry_s
        return True

    def succeeded(self) -> bool:
        """The server answered; whether that closes the breaker."""
        was_open, self._failures = self.is_open, 0
        return was_open

    def failed(self) -> bool:
        """It did not; whether that opens the breaker."""
        was_open = self.is_open
        self._failures += 1
        if not self.is_open:
            return False
        self._next_try = self.clock() + self.retry_s
        self.opened += not was_open
        return not was_open


class PendingWrite(NamedTuple):
    """An answer to be stored."""

    key: bytes
    tags: EntryTags
    answer: CachedAnswer
    size_bytes: int
    ticket: bytes


class WriteBehind:
    """Writes one after the other, in a task of its own; a bounded number wait, and those beyond are not written.

    Args:
        write: stores one; must not raise.
        dropped: told of each that is given up.
    """

    def __init__(
        self,
        write: Callable[[PendingWrite], Awaitable[None]],
        dropped: Callable[[DropReason], None],
        max_entries: int,
        max_bytes: int,
    ) -> None:
        self.pending_bytes = 0
        self._write, self._dropped = write, dropped
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._queue: deque[PendingWrite] = deque()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, pending: PendingWrite) -> None:
        """Take a place in the queue, if there is one."""
        if len(self._queue) >= self._max_entries or self.pending_bytes + pending.size_bytes > self._max_bytes:
            self._dropped("full")
            return
        self._queue.append(pending)
        self.pending_bytes += pending.size_bytes
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def forget(self, model: str | None, tenant: str | None) -> None:
        """Drop what waits of a model, of a tenant, or of both (None: of any)."""
        waiting, self._queue = self._queue, deque()
        for pending in waiting:
            if model in (None, pending.tags.model) and tenant in (None, pending.tags.tenant):
                self.pending_bytes -= pending.size_bytes
                self._dropped("flushed")
            else:
                self._queue.append(pending)

    async def close(self) -> None:
        """Stop writing."""
        self._queue.clear()
        self.pending_bytes = 0
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while self._queue:
            pending = self._queue.popleft()
            self.pending_bytes -= pending.size_bytes
            await self._write(pending)
