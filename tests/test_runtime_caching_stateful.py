"""The result cache under any sequence of operations, against a naive model.

With `test_runtime_batching_stateful` at least 100,000 operations are run each time, and counted.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pimoe.runtime.caching import CacheLimits, ResultCache
from pimoe.runtime.caching.eviction import POLICIES
from pimoe.runtime.caching.result_cache import ENTRY_OVERHEAD_BYTES, EntryTags

OPERATIONS: Counter[str] = Counter()
LEAST = 50_000

NAMES = [b"%d" % n for n in range(24)]
SLOT = ENTRY_OVERHEAD_BYTES + 100
TAGS = st.sampled_from(
    [EntryTags(), EntryTags("m"), EntryTags("m", "t"), EntryTags("n", "t"), EntryTags("n", "u")]
)


class Known(NamedTuple):
    """What the model knows of an entry."""

    value: str
    size_bytes: int
    born: float
    tags: EntryTags


class CacheMachine(RuleBasedStateMachine):
    """The cache against a plain dictionary, in the order in which LRU and FIFO let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.limits = CacheLimits(6 * SLOT, ttl_s=20.0)
        self.cache: ResultCache[str] = ResultCache(self.limits, lambda: self.now)
        self.known: dict[bytes, Known] = {}
        self.numbers = 0
        self.stored = self.replaced = self.turned_away = 0

    def is_dead(self, entry: Known) -> bool:
        return entry.born + self.limits.ttl_s <= self.now

    @property
    def is_ordered(self) -> bool:
        return self.limits.policy in ("lru", "fifo")

    def look(self, made_room: bool = True) -> set[bytes]:
        """Take over what the cache let go of, if it had a reason to; who of them was still good."""
        held = self.cache._entries
        gone = [key for key in self.known if key not in held]
        good = {key for key in gone if not self.is_dead(self.known[key])}
        assert made_room or not good
        if self.is_ordered and gone:
            order = list(self.known)
            kept = [place for place, key in enumerate(order) if key in held]
            assert all(order.index(key) < min(kept, default=len(order)) for key in good)
            if gone[-1] in good:  # and it had to go: there would not have been room for it
                target_bytes = self.cache.statistics().target_bytes
                assert self.cache.statistics().bytes + self.known[gone[-1]].size_bytes > target_bytes
        for key in gone:
            del self.known[key]
        return good

    def use(self, key: bytes) -> None:
        OPERATIONS["cache"] += 1
        value, entry = self.cache.get(key), self.known.get(key)
        if value is None:
            assert entry is None or self.is_dead(entry)
        else:
            assert entry is not None
            assert value == entry.value
            assert not self.is_dead(entry)
            if self.limits.policy == "lru":
                self.known[key] = self.known.pop(key)
        self.look(made_room=self.limits.min_bytes is not None)
        assert value is None or key in self.cache or self.limits.min_bytes is not None

    @rule(key=st.sampled_from(NAMES))
    def get(self, key: bytes) -> None:
        inside = key in self.cache
        self.use(key)
        assert inside or key not in self.cache

    @rule(start=st.integers(0, 23), step=st.integers(1, 5), count=st.integers(10, 60))
    def get_many(self, start: int, step: int, count: int) -> None:
        for n in range(count):
            self.use(NAMES[(start + n * step) % len(NAMES)])

    @rule(
        key=st.sampled_from(NAMES),
        slots=st.sampled_from([1, 1, 1, 2, 7]),
        over=st.sampled_from([0, 0, 0, 1, 300]),
        tags=TAGS,
        age_s=st.sampled_from([0.0, 0.0, 0.0, 15.0, 30.0]),
    )
    def put(self, key: bytes, slots: int, over: int, tags: EntryTags, age_s: float) -> None:
        OPERATIONS["cache"] += 1
        self.numbers += 1
        new = Known(str(self.numbers), slots * SLOT + over, self.now - age_s, tags)
        before = self.cache.statistics()
        self.cache.put(key, new.value, new.size_bytes - ENTRY_OVERHEAD_BYTES, tags, age_s)
        if new.size_bytes > min(before.target_bytes, self.limits.max_entry_bytes):
            assert self.cache.statistics().too_large == before.too_large + 1
            self.look(made_room=False)
            return
        self.replaced += self.known.pop(key, None) is not None
        entry = self.cache._entries.get(key)
        good = self.look()
        if entry is None:
            assert not good or self.limits.policy == "w-tinylfu"
            if not self.is_dead(new):
                assert self.limits.policy == "w-tinylfu"
                assert self.cache.statistics().rejected > before.rejected
                self.turned_away += 1
            return
        assert not self.is_dead(new)
        assert (entry.value, entry.size_bytes) == (new.value, new.size_bytes)
        self.known[key] = new
        self.stored += 1
        room = before.target_bytes - before.bytes
        assert not good or new.size_bytes > room

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 20.0]))
    def wait(self, seconds: float) -> None:
        OPERATIONS["cache"] += 1
        self.now += seconds
        for key, entry in self.known.items():
            assert (key in self.cache) != self.is_dead(entry)

    @rule(model=st.sampled_from([None, "m", "n", "", "x"]), tenant=st.sampled_from([None, None, "t", "u", ""]))
    def flush(self, model: str | None, tenant: str | None) -> None:
        OPERATIONS["cache"] += 1
        doomed = [
            key
            for key, entry in self.known.items()
            if (model is None or entry.tags.model == model) and (tenant is None or entry.tags.tenant == tenant)
        ]
        assert self.cache.flush(model, tenant) == len(doomed)
        for key in doomed:
            assert self.cache._entries.get(key) is None
            del self.known[key]

    @rule(
        slots=st.sampled_from([0, 1, 3, 6, 6, 12, 24]),
        policy=st.sampled_from(["lru", "fifo", *POLICIES]),
        ttl_s=st.sampled_from([20.0, 20.0, 20.0, 5.0, 0.0]),
        max_entry_bytes=st.sampled_from([100 * SLOT, 100 * SLOT, 2 * SLOT]),
        least=st.sampled_from([None, None, 0.0, 0.5, 1.0]),
    )
    def change_limits(
        self, slots: int, policy: str, ttl_s: float, max_entry_bytes: int, least: float | None
    ) -> None:
        OPERATIONS["cache"] += 1
        max_bytes = slots * SLOT
        min_bytes = None if least is None else int(least * max_bytes)
        before, order = self.limits, list(self.cache._policy)
        self.limits = CacheLimits(max_bytes, max_entry_bytes, ttl_s, policy, min_bytes)
        self.cache.limits = self.limits
        if policy != before.policy and self.is_ordered:
            self.known = {key: self.known[key] for key in order}  # as it was taken over
        self.look()

    @invariant()
    def it_is_bounded_and_true(self) -> None:
        cache, statistics = self.cache, self.cache.statistics()
        sizes = [entry.size_bytes for entry in self.known.values()]
        assert statistics[:2] == (len(sizes), sum(sizes))
        assert statistics.bytes <= statistics.target_bytes <= statistics.max_bytes == self.limits.max_bytes
        assert statistics.target_bytes >= (
            self.limits.max_bytes if self.limits.min_bytes is None else self.limits.min_bytes
        )
        keys = list(cache._policy)
        assert len(keys) == len(set(keys))
        assert set(keys) == set(self.known) == set(cache._entries)
        assert not self.is_ordered or keys == list(self.known)
        gone = statistics.evicted + statistics.expired + statistics.flushed + self.replaced
        assert self.stored == len(sizes) + gone + statistics.rejected - self.turned_away

    def teardown(self) -> None:
        self.cache.clear()
        assert self.cache.statistics()[:2] == (0, 0)
        assert list(self.cache._policy) == []


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=100,
    stateful_step_count=250,
    # Runs are long, and the same every time; long ones may exceed the engine's store of choices.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def test_so_many_operations_were_run(capsys: pytest.CaptureFixture[str]) -> None:
    if not OPERATIONS["cache"]:
        pytest.skip("the machine did not run")
    with capsys.disabled():
        print(f"\ncache: {OPERATIONS['cache']:,} operations")
    assert OPERATIONS["cache"] >= LEAST
