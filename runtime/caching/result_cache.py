"""A cache bounded by bytes, with time to live and a choice of who makes room (see `eviction`).

Values are opaque. The cache runs on one event loop and needs no locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import length_hint
from typing import Generic, NamedTuple, TypeVar

from ..errors import ConfigurationError
from .adaptive_size import AdaptiveSize, SizeRange
from .eviction import POLICIES, make_policy

V = TypeVar("V")

ENTRY_OVERHEAD_BYTES = 512  # key, entry and value objects, the policy's place for it; measured with tracemalloc
_EXPIRY_STEP = 4  # entries looked at for each one stored


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds of the cache.

    Attributes:
        max_bytes: of all entries; 0 switches the cache off.
        max_entry_bytes: larger answers are not stored.
        ttl_s: age after which an entry is no longer given.
        policy: which entry makes room: one of `POLICIES`.
        min_bytes: the size adapts to what is asked, from here to `max_bytes` (see `adaptive_size`); None: it is
            `max_bytes`.
    """

    max_bytes: int = 256 * 2**20
    max_entry_bytes: int = 16 * 2**20
    ttl_s: float = 3600.0
    policy: str = "lru"
    min_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_entry_bytes", "ttl_s"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"cache.{name} is {getattr(self, name)}; it must not be negative", name)
        if self.policy not in POLICIES:
            names = ", ".join(POLICIES)
            raise ConfigurationError(f"cache.policy is {self.policy!r}; it must be one of {names}", "policy")
        if self.min_bytes is not None and not 0 <= self.min_bytes <= self.max_bytes:
            raise ConfigurationError(
                f"cache.min_bytes is {self.min_bytes}; it must be from 0 to max_bytes, {self.max_bytes}",
                "min_bytes",
            )


class EntryTags(NamedTuple):
    """Whose an entry is, for flushing."""

    model: str = ""
    tenant: str = ""


_UNTAGGED = EntryTags()


class CacheStatistics(NamedTuple):
    """Entries and bytes now; counts since start.

    Attributes:
        evicted: made room for others.
        rejected: not worth the room, by the policy's admission; not among the evicted.
        target_bytes: the size in force: `max_bytes`, or what it has adapted to.
        ghost_hits: asked for soon after it was evicted; counted when the size adapts.
    """

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
    flushed: int
    rejected: int
    target_bytes: int
    ghost_hits: int


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    size_bytes: int
    born: float
    tags: EntryTags


class ResultCache(Generic[V]):
    """Bytes, ages and tags; `limits.policy` says who makes room.

    Args:
        clock: monotonic seconds; tests inject theirs.
    """

    def __init__(self, limits: CacheLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self.hits = self.misses = self.coalesced = self.bypassed = 0
        self._clock = clock
        self._entries: dict[bytes, _Entry[V]] = {}
        self._round: Iterator[bytes] = iter(())
        self._policy = make_policy(limits.policy, limits.max_bytes)
        self._bytes = 0
        self._adaptive: AdaptiveSize | None = None
        self._evicted = self._rejected = self._expired = self._too_large = self._flushed = self._ghost_hits = 0
        self._adapt(limits.max_bytes if limits.min_bytes is None else limits.min_bytes)

    def __contains__(self, key: bytes) -> bool:
        """Whether `get` would give a value; counts as no use of it."""
        entry = self._entries.get(key)
        return entry is not None and not self._is_dead(entry)

    def holds(self, key: bytes, value: V) -> bool:
        """Whether `get` would give this very value; counts as no use of it."""
        entry = self._entries.get(key)
        return entry is not None and entry.value is value and not self._is_dead(entry)

    @property
    def limits(self) -> CacheLimits:
        """The bounds and the policy; may be set while serving, and hold at once. Entries are kept."""
        return self._limits

    @limits.setter
    def limits(self, limits: CacheLimits) -> None:
        previous, target_bytes = self._limits, self._target_bytes
        self._limits = limits
        if limits.policy != previous.policy:
            self._carry_over()
        if (limits.min_bytes, limits.max_bytes) != (previous.min_bytes, previous.max_bytes):
            self._adapt(target_bytes)

    def get(self, key: bytes) -> V | None:
        """The value, or None. Counting hits and misses is the caller's part: only it knows of single flight."""
        entry = self._entries.get(key)
        if entry is not None and self._is_dead(entry):
            self._expire(key)
            entry = None
        if entry is None:
            self._policy.missed(key)
        else:
            self._policy.touched(key)
        if self._adaptive is not None:
            self._review(self._adaptive, key, entry is not None)
        return None if entry is None else entry.value

    def put(self, key: bytes, value: V, size_bytes: int, tags: EntryTags = _UNTAGGED, age_s: float = 0.0) -> None:
        """Store a value of `size_bytes`, pushing out others, unless the policy finds it not worth that.

        Args:
            age_s: how old it is already, in another cache perhaps.
        """
        size_bytes += ENTRY_OVERHEAD_BYTES
        if size_bytes > min(self._limits.max_entry_bytes, self._target_bytes):
            self._too_large += 1
            if self._adaptive is not None and size_bytes <= self._limits.max_entry_bytes:
                self._adaptive.lacked_room(key, size_bytes)
            return
        if key in self._entries:
            self._drop(key)
            self._policy.removed(key)
        self._expire_some()
        entry = _Entry(value, size_bytes, self._clock() - age_s, tags)
        if self._is_dead(entry):
            return
        self._policy.added(key, size_bytes)
        if self._make_room(size_bytes, key):
            self._entries[key] = entry
            self._bytes += size_bytes

    def flush(self, model: str | None = None, tenant: str | None = None) -> int:
        """Forget the entries of a model, of a tenant, or of both (None: of any); how many there were."""
        doomed = [
            key
            for key, entry in self._entries.items()
            if model in (None, entry.tags.model) and tenant in (None, entry.tags.tenant)
        ]
        for key in doomed:
            self._drop(key)
            self._policy.removed(key)
        self._flushed += len(doomed)
        return len(doomed)

    def clear(self) -> int:
        """Forget everything; how many entries there were."""
        return self.flush()

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
            flushed=self._flushed,
            rejected=self._rejected,
            target_bytes=self._target_bytes,
            ghost_hits=self._ghost_hits,
        )

    @property
    def _target_bytes(self) -> int:
        return self._limits.max_bytes if self._adaptive is None else self._adaptive.target_bytes

    def _make_room(self, size_bytes: int, newcomer: bytes | None = None) -> bool:
        """Push entries out until so many bytes are free; False when it is the newcomer that has to go."""
        while self._bytes + size_bytes > self._target_bytes:
            key, refused = self._policy.victim()
            self._rejected += refused
            if self._adaptive is not None:
                gone = size_bytes if key == newcomer else self._entries[key].size_bytes
                self._adaptive.lacked_room(key, gone)
            if key == newcomer:
                return False
            self._evicted += not refused
            self._drop(key)
        return True

    def _adapt(self, target_bytes: int) -> None:
        """Begin with this size, where the limits leave a choice."""
        limits = self._limits
        if limits.min_bytes in (None, limits.max_bytes):
            self._adaptive = None
        else:
            self._adaptive = AdaptiveSize(SizeRange(limits.min_bytes or 0, limits.max_bytes), target_bytes)
        self._resize()

    def _review(self, adaptive: AdaptiveSize, key: bytes, hit: bool) -> None:
        if hit:
            adaptive.hit(key)
        else:
            self._ghost_hits += adaptive.missed(key)
        if adaptive.is_due:
            adaptive.review(len(self._entries))
            self._resize()
        elif not adaptive.needs_marking:
            return
        coldest = ((key, self._entries[key].size_bytes) for key in self._policy)
        adaptive.mark(coldest, adaptive.target_bytes - self._bytes)

    def _resize(self) -> None:
        self._policy.resize(self._target_bytes)
        self._make_room(0)

    def _carry_over(self) -> None:
        policy = make_policy(self._limits.policy, self._target_bytes)
        for key in self._policy:
            policy.added(key, self._entries[key].size_bytes)
        self._policy = policy

    def _expire_some(self) -> None:
        """Go round all entries, a few at a time, so that the dead do not push out the living for long."""
        for key in islice(self._round, _EXPIRY_STEP):
            if key in self._entries and self._is_dead(self._entries[key]):
                self._expire(key)
        if not length_hint(self._round):
            self._round = iter(list(self._entries))

    def _expire(self, key: bytes) -> None:
        self._drop(key)
        self._policy.removed(key)
        self._expired += 1

    def _is_dead(self, entry: _Entry[V]) -> bool:
        return entry.born + self._limits.ttl_s <= self._clock()

    def _drop(self, key: bytes) -> None:
        self._bytes -= self._entries.pop(key).size_bytes
        if self._adaptive is not None:
            self._adaptive.dropped(key)
