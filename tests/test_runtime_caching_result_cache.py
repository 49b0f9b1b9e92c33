"""The result cache: bytes, age and counts, on an injected clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.caching import CacheLimits, ResultCache
from pimoe.runtime.caching.result_cache import ENTRY_OVERHEAD_BYTES
from pimoe.runtime.errors import ConfigurationError

SLOT = ENTRY_OVERHEAD_BYTES + 100


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def new_cache(slots: int = 3, clock: Clock | None = None, **limits: float) -> ResultCache[str]:
    return ResultCache(CacheLimits(slots * SLOT, **limits), clock or Clock())  # type: ignore[arg-type]


def fill(cache: ResultCache[str], names: str) -> None:
    for name in names:
        cache.put(name.encode(), name, 100)


def held(cache: ResultCache[str], names: str) -> str:
    return "".join(name for name in names if cache.get(name.encode()) is not None)


def test_the_least_recently_used_goes_first() -> None:
    cache = new_cache(3)
    fill(cache, "abc")
    assert cache.get(b"a") == "a"
    fill(cache, "d")
    assert held(cache, "abcd") == "acd"
    assert cache.statistics().evicted == 1


def test_bytes_are_bounded_not_entries() -> None:
    cache = new_cache(3)
    fill(cache, "abc")
    cache.put(b"big", "big", 2 * SLOT - ENTRY_OVERHEAD_BYTES)
    assert held(cache, "abc") == "c"
    assert cache.get(b"big") == "big"
    assert cache.statistics().bytes == 3 * SLOT


def test_entries_age() -> None:
    clock = Clock()
    cache = new_cache(3, clock, ttl_s=10.0)
    fill(cache, "a")
    clock.now += 5.0
    fill(cache, "b")
    clock.now += 4.9
    assert held(cache, "ab") == "ab"  # being read does not make an answer younger
    clock.now += 0.1
    assert held(cache, "ab") == "b"
    assert (cache.statistics().entries, cache.statistics().expired) == (1, 1)
    clock.now += 5.0
    assert held(cache, "ab") == ""
    assert cache.statistics()[:2] == (0, 0)


def test_what_is_too_large_is_not_stored() -> None:
    cache = new_cache(3, max_entry_bytes=SLOT)
    fill(cache, "a")
    cache.put(b"b", "b", 101)
    assert held(cache, "ab") == "a"
    assert cache.statistics().too_large == 1
    whole = new_cache(1)
    whole.put(b"a", "a", 101)
    assert whole.statistics()[:2] == (0, 0)


def test_replacing_counts_bytes_once() -> None:
    cache = new_cache(3)
    fill(cache, "abc")
    cache.put(b"a", "A", 50)
    assert cache.get(b"a") == "A"
    assert cache.statistics()[:2] == (3, 3 * SLOT - 50)
    assert cache.statistics().evicted == 0


def test_smaller_limits_evict_at_once() -> None:
    cache = new_cache(4)
    fill(cache, "abcd")
    assert cache.get(b"a") == "a"
    cache.limits = CacheLimits(2 * SLOT)
    assert cache.limits.max_bytes == cache.statistics().max_bytes == 2 * SLOT
    assert held(cache, "abcd") == "ad"
    assert cache.statistics().evicted == 2
    cache.limits = CacheLimits(0)
    assert cache.statistics()[:2] == (0, 0)
    fill(cache, "e")
    assert held(cache, "e") == ""


def test_a_shorter_life_holds_for_what_is_stored() -> None:
    clock = Clock()
    cache = new_cache(3, clock)
    fill(cache, "a")
    clock.now += 60.0
    assert held(cache, "a") == "a"
    cache.limits = CacheLimits(3 * SLOT, ttl_s=30.0)
    assert held(cache, "a") == ""


def test_clearing_tells_how_many_there_were() -> None:
    cache = new_cache(3)
    fill(cache, "abc")
    assert cache.clear() == 3
    assert cache.clear() == 0
    assert cache.statistics()[:2] == (0, 0)
    fill(cache, "d")
    assert held(cache, "abcd") == "d"


def test_a_new_cache_has_counted_nothing() -> None:
    assert new_cache(1).statistics() == (0, 0, SLOT, 0, 0, 0, 0, 0, 0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3 * SLOT), st.booleans()), max_size=40))
def test_the_bounds_hold_under_anything(operations: list[tuple[str, int, bool]]) -> None:
    cache = new_cache(3)
    stored: dict[str, int] = {}
    for name, size, put in operations:
        if put:
            cache.put(name.encode(), f"{name}{size}", size)
            if size + ENTRY_OVERHEAD_BYTES <= 3 * SLOT:
                stored[name] = size
        elif (value := cache.get(name.encode())) is not None:
            assert value == f"{name}{stored[name]}"
        entries = held(cache, "abcdef")
        assert cache.statistics().entries == len(entries)
        assert cache.statistics().bytes == sum(stored[key] + ENTRY_OVERHEAD_BYTES for key in entries) <= 3 * SLOT


@pytest.mark.parametrize(
    ("name", "value"), [("max_bytes", -1), ("max_entry_bytes", -1), ("ttl_s", -0.5), ("ttl_s", float("nan"))]
)
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"cache.{name} is {value}"):
        CacheLimits(**{name: value})  # type: ignore[arg-type]
