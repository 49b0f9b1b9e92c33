"""Prefetching: what follows what is learned under interleaving, within bounds; acting on it is in nobody's way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from cache_backend import generation, inference
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.caching.prefetch import Prefetcher, PrefetchLimits, PrefetchStatistics
from pimoe.runtime.caching.prefetch_limits import Budget
from pimoe.runtime.caching.sequences import (
    MAX_COUNT,
    MAX_SUCCESSORS,
    WINDOW,
    Request,
    SequenceRecorder,
    request_bytes,
)
from pimoe.runtime.errors import ConfigurationError
from waiting import eventually, nothing_left_behind  # noqa: F401

MEGABYTE = 2**20


def request(name: str, prompt_tokens: int = 2) -> Request:
    return replace(generation(name), prompt_token_ids=(1,) * prompt_tokens)


# Sequences -----------------------------------------------------------------------------------------------------


class Recorded:
    """A recorder, and a clock that ticks with every request."""

    def __init__(self, max_nodes: int = 100, max_request_bytes: int = MEGABYTE, horizon_s: float = 50.0) -> None:
        self.recorder = SequenceRecorder(max_nodes, max_request_bytes, horizon_s)
        self.now = 0.0

    def ask(self, names: str, tenant: str = "t", every_s: float = 1.0) -> None:
        for name in names:
            self.now += every_s
            self.recorder.record(tenant, name.encode(), request(name), self.now)

    def next(self, name: str, tenant: str = "t", min_confidence: float = 0.7, min_occurrences: int = 3) -> str:
        found = self.recorder.predict(tenant, name.encode(), min_confidence, min_occurrences)
        return "".join(prediction.key.decode() for prediction in found)


def test_what_follows_is_expected_after_enough_times() -> None:
    recorded = Recorded()
    for times in range(5):
        recorded.now += 100
        assert recorded.next("a") == ("b" if times >= 3 else "")
        recorded.ask("ab")
    assert recorded.next("b") == ""
    assert recorded.next("unknown") == ""


def test_the_request_that_is_expected_is_the_one_that_came() -> None:
    recorded = Recorded()
    recorded.ask("ab" * 4)
    (found,) = recorded.recorder.predict("t", b"a", 0.7, 3)
    assert found.request == request("b")
    assert found.confidence == 1.0


@pytest.mark.parametrize("callers", [1, 2, 4])
def test_callers_that_take_turns_do_not_hide_each_other(callers: int) -> None:
    recorded, chance = Recorded(max_nodes=1000), random.Random(0)
    pairs = ["ab", "cd", "ef", "gh"][:callers]
    for _ in range(12):
        recorded.now += 100
        waiting = [list(pair) for pair in pairs]
        while waiting := [names for names in waiting if names]:
            recorded.ask(chance.choice(waiting).pop(0))
    for first, second in pairs:
        assert second in recorded.next(first)


def test_noise_is_not_expected() -> None:
    recorded, chance = Recorded(), random.Random(0)
    names = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    recorded.ask("".join(chance.choice(names) for _ in range(3000)))
    assert [name for name in names if recorded.next(name)] == []


def test_what_comes_too_late_does_not_follow() -> None:
    recorded = Recorded(horizon_s=50.0)
    for _ in range(5):
        recorded.now += 1000
        recorded.ask("ab", every_s=51.0)
    assert recorded.next("a") == ""
    for _ in range(20):
        recorded.now += 1000
        recorded.ask("ab", every_s=50.0)
    assert recorded.next("a") == "b"


def test_what_comes_after_too_many_others_does_not_follow() -> None:
    recorded = Recorded()
    for times in range(5):
        recorded.ask("a" + "".join(chr(1000 + WINDOW * times + i) for i in range(WINDOW)) + "b")
    assert recorded.next("a") == ""


def test_tenants_learn_apart() -> None:
    recorded = Recorded()
    for _ in range(5):
        recorded.ask("a", "one")
        recorded.ask("b", "other")
    assert recorded.next("a", "one") == recorded.next("a", "other") == ""
    for _ in range(5):
        recorded.ask("ac", "one")
    assert recorded.next("a", "one", 0.4) == "c"
    assert recorded.next("a", "other", 0.1) == ""


def test_new_habits_replace_old_ones() -> None:
    recorded = Recorded()
    for _ in range(100):
        recorded.now += 100
        recorded.ask("ab")
    assert recorded.next("a") == "b"
    for _ in range(100):
        recorded.now += 100
        recorded.ask("ac")
    assert recorded.next("a") == "c"


def test_the_surest_comes_first() -> None:
    recorded = Recorded()
    for times in range(8):
        recorded.now += 100
        recorded.ask("abc" if times % 2 else "ac")
    assert recorded.next("a", min_confidence=0.4) == "cb"


@given(
    st.lists(st.tuples(st.integers(0, 300), st.sampled_from("tuvw"), st.integers(0, 3)), max_size=300),
    st.integers(1, 20),
    st.integers(0, 20_000),
)
def test_everything_is_bounded(asked: list[tuple[int, str, int]], max_nodes: int, max_request_bytes: int) -> None:
    recorder = SequenceRecorder(max_nodes, max_request_bytes, 10.0)
    for number, (key, tenant, size) in enumerate(asked):
        made = request("g", 40 * size) if size < 3 else inference()
        recorder.record(tenant, b"%d" % key, made, float(number))
        assert len(recorder) <= max_nodes
        kept = [node.size_bytes for node in recorder._nodes.values()]
        assert recorder.request_bytes == sum(kept) <= max_request_bytes
        assert all(8 * size_bytes <= max_request_bytes for size_bytes in kept)
        assert len(recorder._recent) <= max_nodes
        assert all(len(node.successors) <= MAX_SUCCESSORS for node in recorder._nodes.values())
        assert all(node.count < MAX_COUNT for node in recorder._nodes.values())


def test_what_recurs_is_not_pushed_out_by_what_does_not() -> None:
    recorded = Recorded(max_nodes=10_000)
    for times in range(30):
        recorded.now += 100
        recorded.ask("ab" + "".join(chr(1000 + 4 * times + i) for i in range(4)))
    assert recorded.next("a", min_confidence=0.3) == "b"


def test_the_bytes_of_a_request_grow_with_it() -> None:
    assert request_bytes(inference()) == 512 + 2 * 4 * 4
    assert request_bytes(request("g", 100)) == 512 + 3600


# The budget ----------------------------------------------------------------------------------------------------


def test_the_budget_is_of_any_minute() -> None:
    budget, limits = Budget(), PrefetchLimits(max_per_minute=2, max_time_share=1.0)
    for now in (0.0, 10.0):
        assert budget.wait_s(limits, now) == 0.0
        budget.began(now)
    assert (budget.left(limits, 20.0), budget.wait_s(limits, 20.0)) == (0, 40.0)
    assert (budget.left(limits, 60.0), budget.wait_s(limits, 60.0)) == (1, 0.0)
    budget.began(60.0)
    assert budget.wait_s(limits, 65.0) == 5.0


def test_each_computation_is_followed_by_its_pause() -> None:
    budget, limits = Budget(), PrefetchLimits(max_time_share=0.1)
    budget.began(0.0)
    budget.spent(limits, 0.0, 2.0)
    assert budget.wait_s(limits, 2.0) == pytest.approx(18.0)
    assert budget.wait_s(limits, 20.0) == pytest.approx(0.0)


def test_no_computations_are_no_computations() -> None:
    budget, limits = Budget(), PrefetchLimits(max_per_minute=0)
    assert (budget.left(limits, 0.0), budget.wait_s(limits, 0.0)) == (0, float("inf"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_per_minute", -1),
        ("max_time_share", 0),
        ("max_time_share", 1.5),
        ("min_confidence", 0.0),
        ("min_confidence", 2.0),
        ("min_occurrences", 0),
        ("min_occurrences", 33),
        ("max_nodes", -1),
        ("max_request_bytes", -1),
        ("horizon_s", float("nan")),
    ],
)
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"prefetch.{name} is {value}"):
        PrefetchLimits(**{name: value})  # type: ignore[arg-type]


# The prefetcher ------------------------------------------------------------------------------------------------


class Stand:
    """A prefetcher between a cache that is a set and a computation that the test lets go on."""

    def __init__(self, **limits: Any) -> None:
        self.now = 1000.0
        self.is_idle = True
        self.cached: set[bytes] = set()
        self.warming: list[Request] = []
        self.cancelled = 0
        self.error: Exception | None = None
        self.going = asyncio.Event()
        self.going.set()
        self.limits = PrefetchLimits(**{"enabled": True, "max_time_share": 1.0, "max_per_minute": 100, **limits})
        self.prefetcher = Prefetcher(self.limits, self.warm, self.idle, self.is_cached, lambda: self.now)
        self.prefetcher.start()

    async def warm(self, request: Request) -> None:
        self.warming.append(request)
        try:
            await self.going.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error

    def idle(self) -> bool:
        return self.is_idle

    def is_cached(self, key: bytes) -> bool:
        return key in self.cached

    def ask(self, names: str, gap_s: float = 0.0) -> None:
        for name in names:
            self.prefetcher.observe("t", name.encode(), generation(name, len(name) + ord(name)))
            self.now += gap_s

    def teach(self, names: str = "ab", times: int = 5) -> None:
        """Without the last ones being acted upon."""
        idle, self.is_idle = self.is_idle, False
        for _ in range(times):
            self.ask(names)
            self.now += 1000
        self.prefetcher._candidates.clear()
        self.is_idle = idle

    @property
    def counts(self) -> PrefetchStatistics:
        return self.prefetcher.statistics()

    async def settled(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def make(nothing_left_behind: None) -> AsyncIterator[Any]:  # noqa: F811
    made: list[Stand] = []

    def new(**limits: Any) -> Stand:
        made.append(Stand(**limits))
        return made[-1]

    yield new
    for stand in made:
        await stand.prefetcher.close()


async def test_what_is_expected_is_computed_as_the_least_urgent(make: Any) -> None:
    stand = make(horizon_s=30.0)
    stand.teach()
    stand.ask("a")
    await eventually(lambda: stand.counts.warmed == 1)
    (warmed,) = stand.warming
    assert warmed.sampling == generation("b", 1 + ord("b")).sampling
    assert (warmed.priority, warmed.timeout_s) == (0.0, 30.0)
    assert warmed.request_id.startswith("prefetch-")
    stand.ask("b")
    assert (stand.counts.useful, stand.counts.wasted) == (1, 0)
    assert stand.counts.recorded == 12


async def test_tensor_requests_too(make: Any) -> None:
    stand = make()
    for _ in range(5):
        stand.now += 1000
        stand.prefetcher.observe("t", b"a", inference("x", 1.0))
        stand.prefetcher.observe("t", b"b", inference("y", 2.0))
    stand.prefetcher.observe("t", b"a", inference("x", 1.0))
    await eventually(lambda: stand.counts.warmed)
    assert stand.warming[0].hidden_states == inference("y", 2.0).hidden_states


async def test_what_is_stored_is_not_computed(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.cached.add(b"b")
    stand.ask("a")
    await stand.settled()
    assert stand.warming == []
    assert stand.counts.warmed == 0


async def test_what_is_stored_meanwhile_is_not_computed(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.is_idle = False
    stand.ask("a")
    await stand.settled()
    assert stand.counts.predicted >= 1
    stand.cached.add(b"b")
    stand.is_idle = True
    stand.prefetcher.load_changed()
    await stand.settled()
    assert stand.warming == []


async def test_it_waits_until_it_is_idle(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.is_idle = False
    stand.ask("a")
    await stand.settled()
    assert stand.warming == []
    stand.is_idle = True
    stand.prefetcher.load_changed()
    await eventually(lambda: stand.counts.warmed == 1)


async def test_it_does_not_wait_longer_than_the_prediction_holds(make: Any) -> None:
    stand = make(horizon_s=30.0)
    stand.teach()
    stand.is_idle = False
    stand.ask("a")
    stand.now += 30.0
    stand.is_idle = True
    stand.prefetcher.load_changed()
    await stand.settled()
    assert stand.warming == []


async def test_it_gives_way_at_once_and_goes_on_afterwards(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.going.clear()
    stand.ask("a")
    await eventually(lambda: stand.warming)
    stand.is_idle = False
    stand.ask("z")
    await eventually(lambda: stand.cancelled == 1)
    await stand.settled()
    assert (stand.counts.cancelled, stand.counts.warmed, len(stand.warming)) == (1, 0, 1)
    stand.going.set()
    stand.is_idle = True
    stand.prefetcher.load_changed()
    await eventually(lambda: stand.counts.warmed == 1)
    assert len(stand.warming) == 2


async def test_a_request_that_comes_while_idle_cancels_nothing(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.going.clear()
    stand.ask("a")
    await eventually(lambda: stand.warming)
    stand.ask("z")  # answered by the cache, say
    await stand.settled()
    assert stand.cancelled == 0


async def test_what_is_asked_for_while_it_is_computed_is_shared(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.going.clear()
    stand.ask("a")
    await eventually(lambda: stand.warming)
    stand.is_idle = False
    stand.ask("bb")
    await stand.settled()
    assert stand.cancelled == 0
    stand.going.set()
    await eventually(lambda: stand.counts.warmed == 1)
    stand.ask("b")
    assert stand.counts.useful == 1  # once, however often


async def test_one_at_a_time_the_surest_first(make: Any) -> None:
    stand = make(min_confidence=0.3)
    stand.teach("acb", 5)
    stand.teach("ac", 5)
    stand.going.clear()
    stand.ask("a")
    await eventually(lambda: stand.warming)
    await stand.settled()
    assert [item.sampling.max_tokens - 1 for item in stand.warming] == [ord("c")]
    stand.going.set()
    await eventually(lambda: stand.counts.warmed == 2)
    assert stand.warming[1].sampling.max_tokens - 1 == ord("b")


async def test_the_budget_holds(make: Any) -> None:
    stand = make(max_per_minute=2)
    stand.teach("abcd")
    stand.ask("a")
    await eventually(lambda: stand.counts.warmed == 2)
    await stand.settled()
    assert (stand.counts.warmed, stand.counts.budget_left) == (2, 0)
    stand.now += 59.9
    stand.prefetcher.load_changed()
    await stand.settled()
    assert stand.counts.warmed == 2
    stand.now += 0.1
    stand.ask("a")
    await eventually(lambda: stand.counts.warmed == 4)


async def test_its_share_of_the_time_holds(make: Any) -> None:
    stand = make(max_time_share=0.1)
    stand.teach("abc")
    stand.going.clear()
    stand.ask("a")
    await eventually(lambda: stand.warming)
    stand.now += 3.0
    stand.going.set()
    await eventually(lambda: stand.counts.warmed == 1)
    stand.now += 26.9
    stand.prefetcher.load_changed()
    await stand.settled()
    assert len(stand.warming) == 1
    stand.now += 0.2
    stand.prefetcher.load_changed()
    await eventually(lambda: stand.counts.warmed == 2)


async def test_a_used_up_budget_is_waited_for(make: Any) -> None:
    """Nothing else wakes it: this is the one timer."""
    stand = make(max_per_minute=1, horizon_s=100.0)
    stand.teach("abc")
    stand.ask("a")
    await eventually(lambda: stand.counts.warmed == 1)
    stand.now += 59.999
    stand.prefetcher.load_changed()
    await stand.settled()
    stand.now += 0.001
    await eventually(lambda: stand.counts.warmed == 2)


async def test_what_nobody_asks_for_was_wasted(make: Any) -> None:
    stand = make(horizon_s=30.0)
    stand.teach()
    stand.ask("a")
    await eventually(lambda: stand.counts.warmed == 1)
    stand.now += 29.9
    assert stand.counts.wasted == 0
    stand.now += 0.1
    assert stand.counts.wasted == 1
    stand.ask("b")
    assert stand.counts.useful == 0


async def test_off_is_off(make: Any) -> None:
    stand = make(enabled=False)
    stand.teach()
    stand.ask("a")
    await stand.settled()
    assert stand.warming == []
    assert stand.counts == (0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert not PrefetchLimits().enabled


async def test_switching_off_gives_up_and_forgets(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.going.clear()
    stand.ask("a")
    await eventually(lambda: stand.warming)
    stand.prefetcher.limits = PrefetchLimits()
    await eventually(lambda: stand.cancelled == 1)
    assert stand.counts[:2] == (0, 0)
    stand.prefetcher.limits = stand.limits
    await stand.settled()
    stand.ask("a")
    await stand.settled()
    assert len(stand.warming) == 1


async def test_a_failure_is_counted_and_stays_here(make: Any) -> None:
    stand = make()
    stand.teach("abc")
    stand.error = RuntimeError("no")
    stand.ask("a")
    await eventually(lambda: stand.counts.failed == 2)
    stand.error = None
    stand.ask("a")
    await eventually(lambda: stand.counts.warmed == 2)


@pytest.mark.parametrize("name", ["_idle", "_is_cached"])
async def test_questions_that_fail_never_reach_the_request(
    make: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise RuntimeError("no")

    stand = make()
    stand.teach()
    with monkeypatch.context() as patch:
        patch.setattr(stand.prefetcher, name, fail)
        stand.ask("a")
        stand.prefetcher.load_changed()
        await stand.settled()
    assert stand.warming == []
    assert stand.counts.failed > 0
    stand.ask("a")
    await eventually(lambda: stand.counts.warmed == 1)


async def test_a_recorder_that_fails_never_reaches_the_request(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    stand = make()
    monkeypatch.setattr(stand.prefetcher._recorder, "record", fail)
    stand.ask("a")
    assert stand.counts.failed == 1


async def test_closing_gives_up_what_is_computed(make: Any) -> None:
    stand = make()
    stand.teach()
    stand.going.clear()
    stand.ask("a")
    await eventually(lambda: stand.warming)
    await stand.prefetcher.close()
    assert stand.cancelled == 1
    await stand.prefetcher.close()


async def test_candidates_are_bounded(make: Any) -> None:
    stand = make(max_nodes=10_000, min_occurrences=1, min_confidence=0.01)
    stand.is_idle = False
    for _ in range(2):
        stand.ask("".join(chr(1000 + i) for i in range(300)))
    assert 0 < len(stand.prefetcher._candidates) <= 64


async def test_nothing_moves_without_start() -> None:
    stand = Stand()
    await stand.prefetcher.close()
    stand.teach()
    stand.ask("a")
    await stand.settled()
    assert stand.warming == []
