"""An LRU cache bounded by bytes, with time to live and single flight.

Values are opaque. The cache runs on one event loop and needs no locks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ..errors import ConfigurationError

V = TypeVar("V")

ENTRY_OVERHEAD_BYTES = 512  # key, dictionary slot, entry and value objects, measured with tracemalloc


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds of the cache.

    Attributes:
        max_bytes: of all entries; 0 switches the cache off.
        max_entry_bytes: larger answers are not stored.
        ttl_s: age after which an entry is no longer given.
    """

    max_bytes: int = 256 * 2**20
    max_entry_bytes: int = 16 * 2**20
    ttl_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"cache.{name} is {getattr(self, name)}; it must not be negative", name)


class CacheStatistics(NamedTuple):
    """Entries and bytes now; counts since start."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    coalesced: int
    bypassed: int
    evicted: int
    expired: int
    too_large: int


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    size_bytes: int
    stored: float


class ResultCache(Generic[V]):
    """Least recently used out first.

    Args:
        clock: monotonic seconds; tests inject theirs.
    """

    def __init__(self, limits: CacheLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self.hits = self.misses = self.coalesced = self.bypassed = 0
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry[V]] = OrderedDict()
        self._bytes = 0
        self._evicted = self._expired = self._too_large = 0

    @property
    def limits(self) -> CacheLimits:
        """The bounds; may be set while serving, and hold at once."""
        return self._limits

    @limits.setter
    def limits(self, limits: CacheLimits) -> None:
        self._limits = limits
        self._evict()

    def get(self, key: bytes) -> V | None:
        """The value, or None. Counting hits and misses is the caller's part: only it knows of single flight."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.stored + self._limits.ttl_s <= self._clock():
            self._remove(key)
            self._expired += 1
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: bytes, value: V, size_bytes: int) -> None:
        """Store a value of `size_bytes`, pushing out the least recently used."""
        size_bytes += ENTRY_OVERHEAD_BYTES
        if size_bytes > min(self._limits.max_entry_bytes, self._limits.max_bytes):
            self._too_large += 1
            return
        self._remove(key)
        self._entries[key] = _Entry(value, size_bytes, self._clock())
        self._bytes += size_bytes
        self._evict()

    def clear(self) -> int:
        """Forget everything; how many entries there were."""
        count = len(self._entries)
        self._entries.clear()
        self._bytes = 0
        return count

    def statistics(self) -> CacheStatistics:
        """See `CacheStatistics`."""
        return CacheStatistics(
            entries=len(self._entries),
            bytes=self._bytes,
            max_bytes=self._limits.max_bytes,
            hits=self.hits,
            misses=self.misses,
            coalesced=self.coalesced,
            bypassed=self.bypassed,
            evicted=self._evicted,
            expired=self._expired,
            too_large=self._too_large,
        )

    def _evict(self) -> None:
        while self._bytes > self._limits.max_bytes:
            self._remove(next(iter(self._entries)))
            self._evicted += 1

    def _remove(self, key: bytes) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self._bytes -= entry.size_bytes
