"""The result cache: bytes, age, tags and counts, on an injected clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.caching import CacheLimits, ResultCache
from pimoe.runtime.caching.eviction import POLICIES
from pimoe.runtime.caching.result_cache import ENTRY_OVERHEAD_BYTES, EntryTags
from pimoe.runtime.errors import ConfigurationError

SLOT = ENTRY_OVERHEAD_BYTES + 100


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def new_cache(slots: int = 3, clock: Clock | None = None, **limits: Any) -> ResultCache[str]:
    return ResultCache(CacheLimits(slots * SLOT, **limits), clock or Clock())


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


def test_holds_tells_one_value_from_an_equal_one_and_is_no_use_of_it() -> None:
    clock = Clock()
    cache: ResultCache[list[int]] = ResultCache(CacheLimits(ttl_s=10.0), clock)
    value, equal = [1], [1]
    cache.put(b"a", value, 1)
    assert cache.holds(b"a", value)
    assert not cache.holds(b"a", equal)
    assert not cache.holds(b"b", value)
    cache.put(b"a", equal, 1)
    assert not cache.holds(b"a", value)
    clock.now += 10.0
    assert not cache.holds(b"a", equal)


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


def test_the_age_that_an_entry_comes_with_counts() -> None:
    clock = Clock()
    cache = new_cache(3, clock, ttl_s=10.0)
    cache.put(b"a", "a", 100, age_s=6.0)
    cache.put(b"b", "b", 100, age_s=10.0)
    assert held(cache, "ab") == "a"
    clock.now += 4.0
    assert b"a" not in cache
    assert held(cache, "a") == ""
    assert cache.statistics()[:2] == (0, 0)


def test_what_is_too_old_to_store_replaces_all_the_same() -> None:
    cache = new_cache(3, ttl_s=10.0)
    fill(cache, "a")
    cache.put(b"a", "A", 100, age_s=20.0)
    assert held(cache, "a") == ""


def test_the_dead_do_not_push_out_the_living() -> None:
    clock = Clock()
    cache = new_cache(20, clock, ttl_s=10.0)
    fill(cache, "abcdefgh")
    clock.now += 5.0
    fill(cache, "ij")
    assert held(cache, "abcdefgh") == "abcdefgh"  # the most recently used, but not for long
    clock.now += 5.0
    fill(cache, "klmnopqrstuvwxyz")
    assert held(cache, "ijklmnopqrstuvwxyz") == "ijklmnopqrstuvwxyz"
    assert (cache.statistics().expired, cache.statistics().evicted) == (8, 0)


def test_looking_whether_it_is_there_is_no_use_of_it() -> None:
    cache = new_cache(2)
    fill(cache, "ab")
    assert b"a" in cache
    assert b"c" not in cache
    fill(cache, "c")
    assert held(cache, "abc") == "bc"


@pytest.mark.parametrize(
    ("model", "tenant", "left"),
    [
        (None, None, ""),
        ("m", None, "cd"),
        (None, "t", "ac"),
        ("m", "t", "acd"),
        ("", None, "abcd"),
        ("t", "m", "abcd"),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_flushing_by_tag(policy: str, model: str | None, tenant: str | None, left: str) -> None:
    cache = new_cache(4, policy=policy)
    for name, tags in zip("abcd", [("m", ""), ("m", "t"), ("n", "u"), ("n", "t")], strict=True):
        cache.put(name.encode(), name, 100, EntryTags(*tags))
    assert cache.flush(model, tenant) == 4 - len(left) == cache.statistics().flushed
    assert held(cache, "abcd") == left
    assert cache.statistics()[:2] == (len(left), len(left) * SLOT)
    fill(cache, "efgh")
    assert cache.statistics().entries == 4


def test_clearing_tells_how_many_there_were() -> None:
    cache = new_cache(3)
    fill(cache, "abc")
    assert cache.clear() == 3
    assert cache.clear() == 0
    assert cache.statistics()[:2] == (0, 0)
    fill(cache, "d")
    assert held(cache, "abcd") == "d"


def test_a_new_cache_has_counted_nothing() -> None:
    assert new_cache(1).statistics() == (0, 0, SLOT, 0, 0, 0, 0, 0, 0, 0, 0, 0, SLOT, 0)


@pytest.mark.parametrize(("policy", "left"), [("lru", "acd"), ("fifo", "bcd"), ("sieve", "acd")])
def test_the_policy_says_who_goes(policy: str, left: str) -> None:
    cache = new_cache(3, policy=policy)
    fill(cache, "abc")
    assert cache.get(b"a") == "a"
    fill(cache, "d")
    assert held(cache, "abcd") == left


def test_w_tinylfu_refuses_what_is_asked_for_less() -> None:
    cache = new_cache(3, policy="w-tinylfu")
    for name in "abc":
        assert cache.get(name.encode()) is None
        fill(cache, name)
        assert cache.get(name.encode()) == name
    assert cache.get(b"d") is None
    fill(cache, "d")
    assert held(cache, "abcd") == "abc"
    assert (cache.statistics().rejected, cache.statistics().evicted) == (1, 0)
    for _ in range(9):
        cache.get(b"d")
    fill(cache, "d")
    assert cache.get(b"d") == "d"
    assert (cache.statistics().rejected, cache.statistics().evicted) == (1, 1)


@pytest.mark.parametrize("before", POLICIES)
@pytest.mark.parametrize("after", POLICIES)
def test_another_policy_keeps_the_entries(before: str, after: str) -> None:
    cache = new_cache(4, policy=before)
    fill(cache, "abcd")
    cache.limits = CacheLimits(4 * SLOT, policy=after)
    assert held(cache, "abcd") == "abcd"
    cache.limits = CacheLimits(2 * SLOT, policy=before)
    assert len(held(cache, "abcd")) == 2
    assert cache.statistics().bytes == 2 * SLOT
    assert cache.flush() == 2


def test_lru_carries_its_order_over() -> None:
    cache = new_cache(3)
    fill(cache, "abc")
    assert cache.get(b"a") == "a"
    cache.limits = CacheLimits(3 * SLOT, policy="fifo")
    fill(cache, "d")
    assert held(cache, "abcd") == "acd"


class Naive:
    """What is stored must be what was put last, under its age and tags; who had to go is the cache's choice."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[str, int, float, EntryTags]] = {}

    def check(self, cache: ResultCache[str], clock: Clock) -> None:
        found = {name for name in "abcdef" if name.encode() in cache}
        statistics = cache.statistics()
        assert statistics.bytes <= statistics.target_bytes <= cache.limits.max_bytes
        assert statistics.entries >= len(found)  # the dead may lie there until they are met
        assert statistics.bytes >= sum(self.entries[name][1] + ENTRY_OVERHEAD_BYTES for name in found)
        for name in found:
            assert self.entries[name][2] + cache.limits.ttl_s > clock.now


TAGS = st.builds(EntryTags, st.sampled_from("mn"), st.sampled_from("tu"))
SIZES = st.integers(0, 5 * SLOT)
OPERATIONS = st.one_of(
    st.tuples(st.just("get"), st.sampled_from("abcdef")),
    st.tuples(st.just("put"), st.sampled_from("abcdef"), SIZES, TAGS, st.sampled_from([0, 0, 7])),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 3.0, 11.0])),
    st.tuples(st.just("flush"), st.sampled_from([None, "m", "n"]), st.sampled_from([None, "t"])),
    st.tuples(
        st.just("limit"),
        st.integers(0, 5 * SLOT),
        st.sampled_from(POLICIES),
        st.sampled_from([None, 0, SLOT // 2]),
    ),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(operations=st.lists(OPERATIONS, max_size=60))
def test_the_bounds_hold_under_anything(policy: str, operations: list[tuple[Any, ...]]) -> None:
    clock = Clock()
    cache, naive = new_cache(3, clock, policy=policy, ttl_s=10.0), Naive()
    for number, (operation, *arguments) in enumerate(operations):
        if operation == "get":
            if (value := cache.get(arguments[0].encode())) is not None:
                assert value == naive.entries[arguments[0]][0]
        elif operation == "put":
            name, size, tags, age_s = arguments
            cache.put(name.encode(), str(number), size, tags, age_s)
            if size + ENTRY_OVERHEAD_BYTES <= cache.statistics().target_bytes:
                naive.entries[name] = (str(number), size, clock.now - age_s, tags)
        elif operation == "wait":
            clock.now += arguments[0]
        elif operation == "flush":
            model, tenant = arguments
            cache.flush(model, tenant)
            for name, (_, _, _, tags) in naive.entries.items():
                if model in (None, tags.model) and tenant in (None, tags.tenant):
                    assert name.encode() not in cache
        else:
            max_bytes, name, min_bytes = arguments
            smallest = None if min_bytes is None else min(min_bytes, max_bytes)
            cache.limits = CacheLimits(max_bytes, ttl_s=10.0, policy=name, min_bytes=smallest)
        naive.check(cache, clock)
    cache.flush()
    assert cache.statistics()[:2] == (0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_over_the_bound_while_room_is_made(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(3, policy=policy)
    fill(cache, "abc")
    seen: list[int] = []
    drop = cache._drop

    def watching(key: bytes) -> None:
        drop(key)
        seen.append(cache.statistics().bytes)

    monkeypatch.setattr(cache, "_drop", watching)
    for _ in range(3):
        cache.get(b"big")
    cache.put(b"big", "big", 2 * SLOT - ENTRY_OVERHEAD_BYTES)
    assert seen == [2 * SLOT, SLOT]
    assert cache.statistics().bytes == 3 * SLOT


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_bytes", -1),
        ("max_entry_bytes", -1),
        ("ttl_s", -0.5),
        ("ttl_s", float("nan")),
        ("min_bytes", -1),
        ("min_bytes", 2**40),
    ],
)
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"cache.{name} is {value}"):
        CacheLimits(**{name: value})  # type: ignore[arg-type]


def test_the_policy_is_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"cache.policy is 'mru'; it must be one of lru, fifo, sieve, w-"):
        CacheLimits(policy="mru")
