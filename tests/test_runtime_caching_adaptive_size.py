"""The adaptive size: the decision with numbers, and a cache that follows what is asked of it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.caching import CacheLimits, ResultCache
from pimoe.runtime.caching.adaptive_size import (
    CALM_REVIEWS,
    MIN_PERIOD,
    AdaptiveSize,
    Evidence,
    SizeRange,
    next_size,
)
from pimoe.runtime.caching.eviction import POLICIES
from pimoe.runtime.caching.result_cache import ENTRY_OVERHEAD_BYTES

SLOT = ENTRY_OVERHEAD_BYTES + 100
RANGE = SizeRange(100, 1700)  # steps of 100


# The decision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "ghost_hits", "tail_hits", "calm", "expected"),
    [
        (500, 10, 0, 2, (600, 0)),  # one of a hundred look-ups is worth a step
        (500, 10, 500, 0, (600, 0)),
        (500, 9, 500, 1, (500, 0)),
        (500, 9, 0, 2, (500, 0)),  # between the two nothing happens
        (500, 0, 3, 2, (500, 0)),
        (500, 0, 2, 0, (500, 1)),
        (500, 2, 0, 1, (500, 2)),
        (500, 2, 2, CALM_REVIEWS - 1, (400, 0)),
        (1700, 1000, 0, 0, (1700, 0)),
        (1650, 1000, 0, 0, (1700, 0)),
        (100, 0, 0, CALM_REVIEWS - 1, (100, 0)),
    ],
)
def test_the_next_size(target: int, ghost_hits: int, tail_hits: int, calm: int, expected: tuple[int, int]) -> None:
    assert next_size(target, RANGE, Evidence(1000, ghost_hits, tail_hits), calm) == expected


@given(st.integers(100, 1700), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 2))
def test_a_step_that_was_just_taken_is_not_undone(target: int, ghosts: int, tail: int, calm: int) -> None:
    """What was a ghost hit before a step is a tail hit after it, and the other way about."""
    size, calm = next_size(target, RANGE, Evidence(1000, ghosts, tail), calm)
    assert 100 <= size <= 1700
    assert abs(size - target) <= 100
    if size > target:
        assert next_size(size, RANGE, Evidence(1000, 0, ghosts), CALM_REVIEWS - 1)[0] == size
    if size < target:
        assert next_size(size, RANGE, Evidence(1000, tail, 0), CALM_REVIEWS - 1)[0] <= size


# The evidence --------------------------------------------------------------------------------------------------


def test_ghosts_are_as_many_bytes_as_a_step() -> None:
    adaptive = AdaptiveSize(RANGE, 100)
    for name in (b"a", b"b", b"c"):
        adaptive.lacked_room(name, 50)
    assert [adaptive.missed(name) for name in (b"a", b"b", b"c", b"c")] == [False, True, True, False]


def test_a_ghost_is_counted_once_whatever_its_sizes_were() -> None:
    adaptive = AdaptiveSize(RANGE, 100)
    for size in (90, 20, 40):
        adaptive.lacked_room(b"a", size)
    adaptive.lacked_room(b"b", 60)
    assert adaptive.missed(b"a")
    assert adaptive.missed(b"b")


def test_one_that_is_larger_than_a_step_is_remembered_all_the_same() -> None:
    adaptive = AdaptiveSize(RANGE, 100)
    adaptive.lacked_room(b"a", 50)
    adaptive.lacked_room(b"large", 1000)
    assert not adaptive.missed(b"a")
    assert adaptive.missed(b"large")


def test_the_tail_is_what_one_step_less_would_cost() -> None:
    def tail_of(free_bytes: int) -> set[bytes]:
        adaptive.mark(((name, 40) for name in (b"a", b"b", b"c", b"d")), free_bytes)
        return set(adaptive._tail)

    adaptive = AdaptiveSize(RANGE, 500)
    assert tail_of(0) == {b"a", b"b", b"c"}
    assert tail_of(20) == {b"a", b"b"}
    assert tail_of(100) == set()


def test_the_tail_is_marked_again_when_little_is_left_of_it() -> None:
    adaptive = AdaptiveSize(RANGE, 500)
    assert not adaptive.needs_marking
    adaptive.mark(((b"%d" % i, 25) for i in range(10)), 0)
    adaptive.hit(b"0")
    adaptive.dropped(b"1")
    assert not adaptive.needs_marking
    adaptive.hit(b"2")
    assert adaptive.needs_marking


# The cache -----------------------------------------------------------------------------------------------------


class Load:
    """Asks a cache, stores what it did not hold, and remembers every size that the cache has had."""

    def __init__(self, policy: str = "lru", min_slots: int = 20, max_slots: int = 340) -> None:
        limits = CacheLimits(max_slots * SLOT, policy=policy, min_bytes=min_slots * SLOT)
        self.cache: ResultCache[int] = ResultCache(limits)
        self.random = random.Random(0)
        self.sizes = [self.slots]

    @property
    def slots(self) -> int:
        return self.cache.statistics().target_bytes // SLOT

    def ask(self, keys: int, requests: int, skew: float = 0.0, first: int = 0) -> float:
        """Hit ratio of so many requests for `keys` keys, of which a share `skew` is for a tenth of them."""
        hits = 0
        for _ in range(requests):
            hot = self.random.random() < skew
            key = b"%d" % (first + self.random.randrange(max(1, keys // 10) if hot else keys))
            if self.cache.get(key) is None:
                self.cache.put(key, 0, 100)
            else:
                hits += 1
            assert self.cache.statistics().bytes <= self.cache.statistics().target_bytes
            if self.slots != self.sizes[-1]:
                self.sizes.append(self.slots)
        return hits / requests


@pytest.mark.parametrize("policy", POLICIES)
def test_it_grows_to_what_is_asked_for_and_no_further(policy: str) -> None:
    load = Load(policy)
    assert load.slots == 20
    load.ask(150, 40 * MIN_PERIOD)
    assert 140 <= load.slots <= 200
    assert load.ask(150, MIN_PERIOD) > 0.9
    assert load.cache.statistics().ghost_hits > 0


@pytest.mark.parametrize("policy", ["lru", "sieve", "w-tinylfu"])  # see the module on FIFO
def test_it_shrinks_when_less_is_asked_for(policy: str) -> None:
    load = Load(policy)
    load.ask(150, 40 * MIN_PERIOD)
    load.ask(30, 60 * MIN_PERIOD)
    assert load.slots <= 60
    assert load.ask(30, MIN_PERIOD) > 0.95


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("keys", "skew"), [(150, 0.0), (1000, 0.5), (100_000, 0.0), (400, 0.8)])
def test_it_does_not_flap(policy: str, keys: int, skew: float) -> None:
    load = Load(policy)
    load.ask(keys, 30 * MIN_PERIOD, skew)
    settled = len(load.sizes)
    load.ask(keys, 40 * MIN_PERIOD, skew)
    steps = [later - earlier for earlier, later in pairwise(load.sizes[settled - 1 :])]
    turns = sum(first * second < 0 for first, second in pairwise(steps))
    assert turns <= 2
    assert len(steps) <= 6


def test_a_scan_makes_it_no_larger() -> None:
    load = Load()
    for key in range(20 * MIN_PERIOD):
        load.ask(1, 1, first=key)
    assert load.sizes == [20]


def test_it_begins_with_nothing_if_it_may() -> None:
    load = Load(min_slots=0)
    load.ask(50, 20 * MIN_PERIOD)
    assert load.ask(50, MIN_PERIOD) > 0.9


def test_without_a_smallest_size_nothing_changes() -> None:
    cache: ResultCache[int] = ResultCache(CacheLimits(20 * SLOT))
    for key in range(5 * MIN_PERIOD):
        if cache.get(b"%d" % (key % 30)) is None:
            cache.put(b"%d" % (key % 30), 0, 100)
    assert cache.statistics().target_bytes == 20 * SLOT
    assert cache.statistics().ghost_hits == 0


def test_limits_set_live_keep_the_size_within_them() -> None:
    load = Load()
    load.ask(150, 40 * MIN_PERIOD)
    size = load.slots
    load.cache.limits = CacheLimits(340 * SLOT, ttl_s=9.0, policy="sieve", min_bytes=20 * SLOT)
    assert load.slots == size  # another policy and lifetime are no reason for another size
    load.cache.limits = CacheLimits(100 * SLOT, min_bytes=20 * SLOT)
    assert load.slots == 100
    assert load.cache.statistics().entries == 100
    load.cache.limits = CacheLimits(400 * SLOT)
    assert load.slots == 400
    load.cache.limits = CacheLimits(400 * SLOT, min_bytes=0)
    assert load.slots == 400  # what is held is not thrown away before it is known to be useless
    load.ask(30, 80 * MIN_PERIOD)
    assert load.slots < 200
