"""The second level in Redis or Valkey. `redis_names` says what lies where.

An entry begins with its ticket: a digest of three random generations (of everything, of its model, of its tenant)
as they stood when the answer was looked up, before it was computed. A flush writes a new generation first and
deletes entries after that: from the first moment on, whatever was looked up, computed or written before it, by
whichever gateway, is a miss. A generation that the server has lost is made anew, and so makes misses too. Only a
server that comes back with a snapshot of before a flush undoes it: let it keep none, or flush again.

A command is never cancelled half-way, since its connection would be of no use: a lookup that is out of time is
left to end by the connection's own timeouts, and the bounded number of connections bounds those.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UnavailableError
from .entry import Associated, CachedAnswer, EntryCodec, EntryError, parse_key
from .redis_client import Failure, client_of, failure_of
from .redis_limits import RedisLimits
from .redis_names import TICKET_BYTES, RedisNames, associated, is_generation, ticket_of
from .result_cache import EntryTags
from .second_level import (
    DROP_REASONS,
    MISS_REASONS,
    Breaker,
    DropReason,
    Found,
    MissReason,
    PendingWrite,
    SecondLevelStatistics,
    WriteBehind,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = logging.getLogger(__name__)

T = TypeVar("T")
Lookup = tuple[Found, MissReason | None]

_GENERATION_TTL_S = 30 * 86_400.0
_THREAD_FROM_BYTES = 1 << 18  # coding that much would hold up the event loop for a millisecond
_SWEEP_S = 10.0
_SWEEP_COUNT = 1000
_WRITE_CONNECTIONS = 2


class RedisLevel:
    """See `SecondLevel` and the module.

    Raises:
        ConfigurationError: a package is missing, or the URL is wrong in a way that the limits do not see.
    """

    def __init__(self, limits: RedisLimits) -> None:
        self._limits = limits
        key = parse_key(limits.encryption_key)
        self._names = RedisNames(limits.namespace)
        self._codec = EntryCodec(limits.compression, key, limits.max_entry_bytes)
        self._reads = client_of(limits, limits.max_connections)
        self._writes = client_of(limits, _WRITE_CONNECTIONS)
        self._breaker = Breaker(limits.breaker_failures, limits.breaker_retry_s)
        self._pending = WriteBehind(self._write, self._drop, limits.max_pending_entries, limits.max_pending_bytes)
        self._running: set[asyncio.Task[Any]] = set()
        self._misses: Counter[str] = Counter(dict.fromkeys(MISS_REASONS, 0))
        self._dropped: Counter[str] = Counter(dict.fromkeys(DROP_REASONS, 0))
        self._hits = self._written = self._flushes = self._read_bytes = self._written_bytes = 0

    async def get(self, key: bytes, tags: EntryTags, fits: Callable[[CachedAnswer], bool]) -> Found:
        """See `SecondLevel`."""
        found, reason = await self._asked(key, tags, fits) if self._breaker.allows() else (Found(), "open")
        if reason is None:
            self._hits += 1
        else:
            self._misses[reason] += 1
        return found

    def put(self, key: bytes, tags: EntryTags, answer: CachedAnswer, size_bytes: int, ticket: bytes) -> None:
        """See `SecondLevel`."""
        if size_bytes > self._limits.max_entry_bytes:
            self._drop("too_large")
        else:
            self._pending.add(PendingWrite(key, tags, answer, size_bytes, ticket))

    async def flush(self, model: str | None = None, tenant: str | None = None) -> int:
        """See `SecondLevel`."""
        self.forget(model, tenant)
        renewed = self._begin(self._writes, [self._names.generation(model, tenant)])
        try:
            await self._bounded(renewed, self._limits.command_timeout_s)
        except Exception as error:
            reason = failure_of(error)
            raise UnavailableError(f"the cache's second level does not answer ({reason})", None, 1.0) from error
        self._flushes += 1
        return await self._sweep(model, tenant)

    def forget(self, model: str | None = None, tenant: str | None = None) -> None:
        """See `SecondLevel`."""
        self._pending.forget(model, tenant)

    async def close(self) -> None:
        """See `SecondLevel`."""
        await self._pending.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.gather(self._reads.aclose(), self._writes.aclose(), return_exceptions=True)

    def statistics(self) -> SecondLevelStatistics:
        """See `SecondLevelStatistics`."""
        return SecondLevelStatistics(
            hits=self._hits,
            misses=dict(self._misses),
            written=self._written,
            dropped=dict(self._dropped),
            pending=len(self._pending),
            pending_bytes=self._pending.pending_bytes,
            read_bytes=self._read_bytes,
            written_bytes=self._written_bytes,
            flushes=self._flushes,
            breaker_open=int(self._breaker.is_open),
            breaker_opened=self._breaker.opened,
        )

    async def _asked(self, key: bytes, tags: EntryTags, fits: Callable[[CachedAnswer], bool]) -> Lookup:
        try:
            answer = await self._bounded(self._look_up(key, tags, fits), self._limits.lookup_timeout_s)
        except Exception as error:
            return Found(), self._failed(error)
        self._succeeded()
        return answer

    async def _look_up(self, key: bytes, tags: EntryTags, fits: Callable[[CachedAnswer], bool]) -> Lookup:
        generations, name = self._names.generations(tags), self._names.entry(key, tags)
        pipe = self._reads.pipeline(transaction=False)
        pipe.mget(generations)
        # A range, not all of it: whatever lies there, no more than the largest entry is sent.
        pipe.getrange(name, 0, self._codec.max_entry_bytes + TICKET_BYTES)
        pipe.pttl(name)
        current, value, remaining_ms = await pipe.execute(raise_on_error=False)
        if isinstance(current, Exception):
            raise current
        ticket = ticket_of(current)
        if ticket is None:
            ticket, foreign = await self._mended(generations)
            if foreign:
                return Found(ticket=ticket), "refused"
        if isinstance(value, Exception):  # of a foreign type, perhaps; what is stored instead overwrites it
            return Found(ticket=ticket), "refused"
        if value == b"" or remaining_ms == -2:  # expired between the two, perhaps
            return Found(ticket=ticket), "absent"
        # None of ours is anything but a string, or lives for ever.
        if not isinstance(value, bytes) or not isinstance(remaining_ms, int) or remaining_ms < 0:
            return Found(ticket=ticket), "corrupt"
        self._read_bytes += len(value)
        if value[:TICKET_BYTES] != ticket:
            return Found(ticket=ticket), "stale"
        try:
            answer = await self._decoded(value[TICKET_BYTES:], associated(key, tags, ticket))
        except EntryError as error:
            return Found(ticket=ticket), error.reason
        if not fits(answer):
            return Found(ticket=ticket), "corrupt"
        return Found(answer, remaining_ms / 1000, ticket), None

    async def _decoded(self, entry: bytes, bound_to: Associated) -> CachedAnswer:
        if len(entry) < _THREAD_FROM_BYTES:
            return self._codec.decode(entry, bound_to)
        return await asyncio.to_thread(self._codec.decode, entry, bound_to)

    async def _encoded(self, answer: CachedAnswer, size_bytes: int, bound_to: Associated) -> bytes:
        if size_bytes < _THREAD_FROM_BYTES:
            return self._codec.encode(answer, bound_to)
        return await asyncio.to_thread(self._codec.encode, answer, bound_to)

    async def _write(self, pending: PendingWrite) -> None:
        key, tags, answer, size_bytes, ticket = pending
        if self._breaker.is_open:
            self._drop("open")
            return
        try:
            entry = await self._encoded(answer, size_bytes, associated(key, tags, ticket))
            value, ttl_ms = ticket + entry, max(1, int(self._limits.ttl_s * 1000))
            command = self._writes.set(self._names.entry(key, tags), value, px=ttl_ms)
            await self._bounded(_awaited(command), self._limits.command_timeout_s)
        except EntryError:
            self._drop("too_large")
        except Exception as error:
            self._drop(self._failed(error))
        else:
            self._succeeded()
            self._written += 1
            self._written_bytes += len(value)

    async def _mended(self, generations: Sequence[str]) -> tuple[bytes | None, bool]:
        """Make those generations that are missing, and overwrite what is none; the ticket, and whether something
        was none. Without a ticket (somebody keeps writing there) the answer is not stored."""
        current = await self._begin(self._reads, generations, only_missing=True)
        foreign = [name for name, value in zip(generations, current, strict=True) if not is_generation(value)]
        if foreign:
            await self._begin(self._reads, foreign)
            current = await self._reads.mget(generations)
        ticket = ticket_of(current)
        if ticket is None:
            self._drop("refused")
        return ticket, bool(foreign)

    async def _begin(self, client: Redis, generations: Sequence[str], only_missing: bool = False) -> list[Any]:
        """Write new generations; what lies there then, None for what is no string."""
        ttl_ms = int(1000 * max(_GENERATION_TTL_S, 2 * self._limits.ttl_s))
        pipe = client.pipeline(transaction=False)
        for name in generations:
            pipe.set(name, os.urandom(TICKET_BYTES), px=ttl_ms, nx=only_missing)
        pipe.mget(generations)
        current: list[Any] = (await pipe.execute())[-1]
        return current

    async def _sweep(self, model: str | None, tenant: str | None) -> int:
        """Delete what a new generation has made invalid; how many were. What is left expires by itself."""
        deleted: list[int] = []
        pattern = self._names.pattern(model, tenant)

        async def sweep() -> None:
            batch: list[bytes] = []
            async for name in self._writes.scan_iter(match=pattern, count=_SWEEP_COUNT):
                batch.append(name)
                if len(batch) == _SWEEP_COUNT:
                    deleted.append(await self._writes.unlink(*batch))
                    batch = []
            if batch:
                deleted.append(await self._writes.unlink(*batch))

        try:
            await self._bounded(sweep(), _SWEEP_S)
        except Exception as error:
            _log.warning("%s: flushed, but not everything was deleted: %s", self._limits.shown, failure_of(error))
        return sum(deleted)

    async def _bounded(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Wait so long for it.

        Raises:
            TimeoutError: it goes on without us.
        """
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            raise TimeoutError
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains of one that came too late

    def _failed(self, error: Exception) -> Failure:
        reason = failure_of(error)
        # An error of the server's own is an answer, and connections that are all in use say nothing about it.
        if reason in ("timeout", "unavailable") and self._breaker.failed():
            _log.warning("%s does not answer (%s): going on without it", self._limits.shown, reason)
        return reason

    def _succeeded(self) -> None:
        if self._breaker.succeeded():
            _log.warning("%s answers again", self._limits.shown)

    def _drop(self, reason: DropReason) -> None:
        self._dropped[reason] += 1


async def _awaited(command: Any) -> Any:
    return await command
