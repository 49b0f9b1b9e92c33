"""A second level without a server: entries are coded as for one, lookups wait for the test where it says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pimoe.runtime.caching.entry import CachedAnswer, EntryCodec
from pimoe.runtime.caching.result_cache import EntryTags
from pimoe.runtime.caching.second_level import DROP_REASONS, MISS_REASONS, Found, SecondLevelStatistics
from pimoe.runtime.errors import UnavailableError


class FakeSecondLevel:
    """See `SecondLevel`. `gate` holds lookups back while it is not set; `away` makes every lookup a miss."""

    def __init__(self) -> None:
        self.entries: dict[bytes, tuple[EntryTags, bytes]] = {}
        self.generation = 0
        self.remaining_s = 1000.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.away = False
        self.lookups = 0
        self.puts = 0
        self.forgotten: list[tuple[str | None, str | None]] = []
        self._codec = EntryCodec()

    async def get(self, key: bytes, tags: EntryTags, fits: Callable[[CachedAnswer], bool]) -> Found:
        self.lookups += 1
        ticket = str(self.generation).encode()
        await self.gate.wait()
        if self.away:
            return Found()
        _, entry = self.entries.get(key, (tags, b""))
        answer = self._codec.decode(entry, (tags.tenant.encode(), key)) if entry else None
        if answer is None or not fits(answer):
            return Found(ticket=ticket)
        return Found(answer, self.remaining_s, ticket)

    def put(self, key: bytes, tags: EntryTags, answer: CachedAnswer, size_bytes: int, ticket: bytes) -> None:
        assert size_bytes > 0
        self.puts += 1
        if ticket == str(self.generation).encode():
            self.entries[key] = (tags, self._codec.encode(answer, (tags.tenant.encode(), key)))

    async def flush(self, model: str | None = None, tenant: str | None = None) -> int:
        if self.away:
            raise UnavailableError("the second level is away")
        self.generation += 1
        gone = [k for k, (t, _) in self.entries.items() if model in (None, t.model) and tenant in (None, t.tenant)]
        for key in gone:
            del self.entries[key]
        return len(gone)

    def forget(self, model: str | None = None, tenant: str | None = None) -> None:
        self.forgotten.append((model, tenant))

    async def close(self) -> None:
        pass

    def statistics(self) -> SecondLevelStatistics:
        misses, dropped = dict.fromkeys(MISS_REASONS, 0), dict.fromkeys(DROP_REASONS, 0)
        return SecondLevelStatistics(0, {**misses}, self.puts, {**dropped}, 0, 0, 0, 0, self.generation, 0, 0)
