"""Who is served and who is given up under overload; and the bound on overtaking that is published."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.batching import (
    Batcher,
    BatchLimits,
    Computed,
    OverloadControl,
    PriorityQueue,
    QueueItem,
    QueueLimits,
)
from pimoe.runtime.batching.downstream import Flight
from pimoe.runtime.batching.policy import overtaking_bound_s, sort_key
from pimoe.runtime.errors import OverloadedError, PimoeError
from waiting import nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]

BATCH, LOW, DEFAULT, HIGH, INTERACTIVE = 0.0, 0.2, 0.5, 0.7, 1.0
EVEN = (1.0, 1.0, 1.0, 1.0, 1.0)
LATE = 1000.0


@dataclass
class Bench:
    """A queue under overload control; every item is named, and late at `LATE`."""

    queue: PriorityQueue[str]
    control: OverloadControl[str]
    given_up: list[str] = field(default_factory=list)

    def push(
        self, name: str, priority: float, key: float = LATE - 1.0, tokens: int = 1, group: Any = None
    ) -> QueueItem[str]:
        def fail(error: PimoeError) -> None:
            assert isinstance(error, OverloadedError)
            self.given_up.append(name)

        item = QueueItem(name, tokens, priority, key, math.inf, key, fail, group)
        self.queue.push(item)
        return item

    def compose(self, room: int, now: float = LATE, service_s: float = 0.0, backlog_s: float = math.inf) -> str:
        """What is served next, taken out, as names."""
        batch, left = self.queue.peek_batch(room, head=self.control.next_head(room, now))
        batch = self.control.compose(batch, left, room, now, service_s, backlog_s)
        self.queue.take(batch, now)
        return "".join(item.value for item in batch)

    @property
    def waiting(self) -> str:
        batch, _ = self.queue.peek_batch(10**9)
        return "".join(item.value for item in batch)


def bench(size: Callable[[QueueItem[str]], int] = lambda item: item.tokens, **limits: Any) -> Bench:
    defaults = {"max_tokens": 10**6, "max_items": 10**5, "class_shares": EVEN, "standing_s": 1e9, "min_share": 0.0}
    queue: PriorityQueue[str] = PriorityQueue(QueueLimits(**{**defaults, **limits}))
    return Bench(queue, OverloadControl(queue, size))


# While nothing is late


def test_nothing_happens_while_nothing_is_late() -> None:
    b = bench(standing_s=0.0, target_delay_s=0.0)
    for n, name in enumerate("abcdef"):
        b.push(name, BATCH if n < 3 else INTERACTIVE, key=LATE + n)
    batch, left = b.queue.peek_batch(2)
    assert b.control.compose(batch, left, 2, LATE, 0.0) is batch
    assert [b.compose(2) for _ in range(3)] == ["ab", "cd", "ef"]
    assert b.given_up == []


def test_what_is_late_alone_goes_by_its_key() -> None:
    b = bench()
    b.push("a", BATCH, key=LATE - 1.0)
    b.push("b", INTERACTIVE, key=LATE + 1.0)
    assert b.compose(1) == "a"  # what is left is in time: it is not passed by


def test_an_empty_queue_is_no_trouble() -> None:
    b = bench(standing_s=0.0)
    assert b.compose(4) == ""
    b.push("a", BATCH, key=0.0)
    assert b.compose(4) == "a"
    assert b.given_up == []


# While items are late


def test_more_important_late_work_goes_first() -> None:
    b = bench(target_delay_s=50.0)
    for n in range(4):
        b.push("l", BATCH, key=LATE - 20.0 + n)
        b.push("h", INTERACTIVE, key=LATE - 10.0 + n)
    assert [b.compose(3) for _ in range(3)] == ["hhh", "llh", "ll"]
    assert b.given_up == []


def test_within_a_class_the_order_of_keys_remains() -> None:
    b = bench(target_delay_s=50.0)
    for n, name in enumerate("abcd"):
        b.push(name, BATCH, key=LATE - 20.0 + n)
    for n, name in enumerate("wxyz"):
        b.push(name, INTERACTIVE, key=LATE - 10.0 + n)
    assert [b.compose(2) for _ in range(4)] == ["wx", "yz", "ab", "cd"]


def test_small_ones_fill_what_a_big_one_cannot_use_and_it_goes_next() -> None:
    b = bench(target_delay_s=50.0)
    b.push("l", BATCH, key=LATE - 20.0)
    for name, tokens in (("a", 3), ("b", 6), ("c", 1), ("d", 3), ("e", 3)):
        b.push(name, INTERACTIVE, key=LATE - 10.0, tokens=tokens)
    assert [b.compose(8) for _ in range(3)] == ["lacd", "b", "e"]


def test_one_that_is_larger_than_all_room_goes_alone() -> None:
    b = bench(target_delay_s=50.0)
    b.push("l", BATCH, key=LATE - 20.0)
    b.push("B", INTERACTIVE, key=LATE - 10.0, tokens=100)
    assert [b.compose(8) for _ in range(2)] == ["B", "l"]


def test_what_is_later_than_the_target_and_would_be_passed_by_is_given_up() -> None:
    b = bench(target_delay_s=5.0)
    b.push("a", BATCH, key=LATE - 5.1)
    b.push("b", BATCH, key=LATE - 4.9)
    b.push("c", LOW, key=LATE - 6.0)
    b.push("h", INTERACTIVE, key=LATE - 3.0)
    assert b.compose(1) == "h"
    assert sorted(b.given_up) == ["a", "c"]
    assert b.waiting == "b"


def test_what_is_not_passed_by_is_kept_however_late() -> None:
    b = bench(target_delay_s=5.0)
    b.push("h", INTERACTIVE, key=LATE - 50.0)
    b.push("a", LOW, key=LATE - 49.0)
    b.push("b", BATCH, key=LATE - 48.0)
    assert [b.compose(1) for _ in range(3)] == ["h", "a", "b"]
    assert b.given_up == []


def test_half_of_its_time_is_as_late_as_the_target() -> None:
    b = bench(target_delay_s=50.0)
    for name, timeout_s in (("a", 9.9), ("b", 10.1)):
        b.push(name, BATCH, key=LATE - 5.0).deadline = LATE - 5.0 + timeout_s
    b.push("h", INTERACTIVE, key=LATE - 3.0)
    assert b.compose(1) == "h"
    assert b.given_up == ["a"]
    assert b.waiting == "b"


def test_the_target_grows_with_the_time_that_a_service_takes() -> None:
    b = bench(target_delay_s=2.0)
    assert (b.control.target_s(0.0), b.control.target_s(1.0)) == (2.0, 8.0)
    for service_s, given_up in ((1.0, []), (0.5, ["a"])):
        b.push("a", BATCH, key=LATE - 5.0)
        b.push("h", INTERACTIVE, key=LATE - 1.0)
        assert b.compose(1, service_s=service_s) == "h"
        assert b.given_up == given_up
        b.queue.drain(OverloadedError("over"))
        b.given_up.clear()


def test_what_cannot_be_given_up_for_a_short_backlog_is_not_passed_by_either() -> None:
    for backlog_s, served, given_up in ((5.1, "h", ["a"]), (4.9, "a", [])):
        b = bench(target_delay_s=5.0)
        b.push("a", BATCH, key=LATE - 5.1)
        b.push("h", INTERACTIVE, key=LATE - 3.0)
        assert b.compose(1, backlog_s=backlog_s) == served
        assert b.given_up == given_up


def test_what_is_late_by_half_of_its_time_may_be_passed_by_and_kept() -> None:
    b = bench(target_delay_s=5.0)
    b.push("a", BATCH, key=LATE - 4.0).deadline = LATE  # it had four seconds
    b.push("h", INTERACTIVE, key=LATE - 3.0)
    assert [b.compose(1, backlog_s=1.9) for _ in range(2)] == ["h", "a"]
    assert b.given_up == []


def test_a_standing_queue_that_is_short_is_not_cut() -> None:
    for backlog_s, cut in ((2.1, True), (1.9, False)):
        b, _ = standing()
        for now in (102.5, 103.0, 103.5):
            b.compose(1, now, backlog_s=backlog_s)
        assert bool(b.given_up) is cut


# Several groups


def test_the_group_of_the_most_important_late_item_goes_first() -> None:
    b = bench(target_delay_s=50.0)
    for n, (name, priority) in enumerate([("l", BATCH), ("m", DEFAULT), ("h", INTERACTIVE), ("m", DEFAULT)]):
        for late_s in (20.0, 10.0):
            b.push(name, priority, key=LATE - late_s + n, group=n)
    assert [b.compose(2) for _ in range(4)] == ["hh", "mm", "mm", "ll"]


def test_a_group_whose_important_items_are_in_time_waits_for_its_turn() -> None:
    b = bench(target_delay_s=50.0)
    b.push("l", BATCH, key=LATE - 1.0, group=1)
    b.push("h", INTERACTIVE, key=LATE + 1.0, group=2)
    assert [b.compose(2) for _ in range(2)] == ["l", "h"]


def test_one_queue_in_order_of_arrival_takes_its_groups_in_order() -> None:
    b = bench(order="fifo")
    b.push("l", BATCH, key=LATE - 2.0, group=1)
    b.push("h", INTERACTIVE, key=LATE - 1.0, group=2)
    assert [b.compose(2) for _ in range(2)] == ["l", "h"]


@pytest.mark.parametrize("share", [1 / 16, 1 / 5])
def test_a_group_of_lower_class_keeps_its_share_of_batches(share: float) -> None:
    b = bench(min_share=share, target_delay_s=1e9)
    served: Counter[str] = Counter()
    for turn in range(400):
        for _ in range(4):
            b.push("l", BATCH, key=float(turn), group=1)
            b.push("h", INTERACTIVE, key=float(turn) + 0.5, group=2)
        served[b.compose(4)] += 1
    assert set(served) == {"llll", "hhhh"}
    assert 0.9 * share * 400 <= served["llll"] <= 1.1 * share * 400
    assert b.given_up == []


@pytest.mark.parametrize(
    "priorities", [(BATCH, DEFAULT, INTERACTIVE), (DEFAULT, DEFAULT, HIGH), (BATCH, BATCH, LOW)]
)
def test_no_group_starves(priorities: tuple[float, ...]) -> None:
    b = bench(min_share=1 / 16, target_delay_s=1e9)
    longest, since = 0, dict.fromkeys("abc", 0)
    for turn in range(1000):
        for name, priority in zip("abc", priorities, strict=True):
            b.push(name, priority, key=float(turn), group=name)
        since[b.compose(1)[0]] = turn
        longest = max(longest, *(turn - last for last in since.values()))
    assert longest <= 70


# The least that each class keeps


@pytest.mark.parametrize("tokens", [1, 3, 7, 16, 40])
@pytest.mark.parametrize("share", [1 / 16, 1 / 5])
def test_each_class_keeps_its_share_over_time(tokens: int, share: float) -> None:
    room = 16
    b = bench(min_share=share, target_delay_s=1e9)  # nothing is ever given up
    served: Counter[str] = Counter()
    for turn in range(800):
        for name, priority in (("l", BATCH), ("m", DEFAULT)):
            while b.waiting.count(name) < 6:
                b.push(name, priority, key=float(turn), tokens=tokens)
        while b.waiting.count("h") < room:
            b.push("h", INTERACTIVE, key=float(turn))
        for name in b.compose(room):
            # One that is larger than the room takes a whole turn, and no more: so much it is charged.
            served[name] += 1 if name == "h" else min(tokens, room)
    for name in "lm":
        assert served[name] >= 0.9 * share * 800 * room
        assert served[name] <= 1.1 * share * 800 * room
    assert b.given_up == []


def test_a_class_that_keeps_nothing_waits() -> None:
    b = bench(min_share=0.0, target_delay_s=1e9)
    b.push("l", BATCH, key=0.0)
    for turn in range(100):
        b.push("h", INTERACTIVE, key=1.0 + turn)
        b.push("h", INTERACTIVE, key=1.0 + turn)
        assert b.compose(1) == "h"
    assert b.waiting.count("l") == 1


def test_credit_is_kept_for_one_turn_at_the_most() -> None:
    b = bench(min_share=1 / 8, target_delay_s=1e9)
    b.push("L", BATCH, key=0.0, tokens=1000)
    for turn in range(2000):
        b.push("h", INTERACTIVE, key=1.0 + turn)
        b.push("h", INTERACTIVE, key=1.0 + turn)
        b.compose(8)
    assert max(b.control._credits) <= 8.0


# A standing queue


def standing() -> tuple[Bench, Callable[[float], str]]:
    """A queue of which one item per turn is served while many wait, more important ones in front."""
    b = bench(target_delay_s=2.0, standing_s=1.0)
    for n in range(20):
        b.push("abcdefghijklmnopqrst"[n], DEFAULT if n < 10 else BATCH, key=100.0 + n / 100)

    def turn(now: float) -> str:
        return b.compose(1, now)

    return b, turn


def test_a_standing_queue_is_cut_after_a_while_only() -> None:
    b, turn = standing()
    for now in (102.5, 102.9, 103.4):
        turn(now)
        assert b.given_up == []
    assert turn(103.5) == "d"
    assert b.waiting == ""
    assert len(b.given_up) == 16


def test_the_newest_of_the_lowest_class_go_first() -> None:
    b, turn = standing()
    assert turn(102.5) == "a"
    assert turn(103.5) == "b"
    assert "".join(b.given_up) == "tsrqponmlkjihgfedc"


def test_only_what_is_later_than_the_target_is_cut() -> None:
    b, turn = standing()
    turn(102.5)
    young = b.push("Y", BATCH, key=101.6)
    turn(103.5)
    assert young.waiting
    assert b.waiting == "Y"


def test_a_queue_that_recovers_starts_anew() -> None:
    b, turn = standing()
    turn(102.5)
    while len(b.queue) > 1:
        b.queue.pop(102.6)
    assert turn(102.7)  # nothing stands behind it any more
    for n in range(3):
        b.push("xyz"[n], BATCH, key=110.0)
    assert turn(112.5) == "x"  # late for a different reason, and not for long
    assert b.given_up == []
    turn(113.6)
    assert b.given_up == ["z"]


def test_a_queue_that_was_empty_meanwhile_has_not_stood() -> None:
    b, turn = standing()
    turn(102.5)
    while len(b.queue):
        b.queue.pop(102.6)  # as a batch that leaves nothing behind
    for n in range(3):
        b.push("xyz"[n], BATCH, key=200.0)
    assert turn(203.0) == "x"
    assert b.given_up == []


def test_a_batcher_that_kept_up_meanwhile_starts_anew() -> None:
    now = 100.0
    queue_limits = QueueLimits(class_shares=EVEN, target_delay_s=2.0, standing_s=1.0)
    batcher: Batcher[int, int] = Batcher(never, BatchLimits(max_batch_tokens=1), queue_limits, lambda: now)

    def push(arrival: float) -> None:
        batcher.queue.push(QueueItem(0, 1, 1.0, arrival, math.inf, arrival, lambda error: None))

    for arrival in (100.0, 100.1, 100.2):
        push(arrival)
    batcher.queue.take(batcher.composer.compose(103.0)[0], 103.0)  # what is left is later than the target
    push(110.0)
    for _ in range(2):
        batcher.queue.pop(103.1)
    assert batcher.composer.compose(110.0)[1] is False  # it was never empty, and does not stand
    push(110.0)
    push(110.0)
    batcher.queue.take(batcher.composer.compose(113.0)[0], 113.0)
    assert batcher.queue.statistics().shed == 0


def test_all_groups_are_cut() -> None:
    b = bench(target_delay_s=2.0, standing_s=0.0)
    for n in range(3):
        b.push("abc"[n], BATCH, key=100.0 + n, group=n)
        b.push("ABC"[n], BATCH, key=100.5 + n, group=n)
    assert b.compose(1, 103.8) == "a"
    assert b.given_up == ["B", "b", "A"]
    assert b.waiting == "cC"


def test_one_queue_in_order_of_arrival_is_left_alone() -> None:
    b = bench(order="fifo", target_delay_s=0.0, standing_s=0.0)
    for n in range(6):
        b.push("abcdef"[n], BATCH if n < 3 else INTERACTIVE, key=float(n))
    assert [b.compose(2, now) for now in (LATE, LATE + 50, LATE + 100)] == ["ab", "cd", "ef"]
    assert b.given_up == []


def test_room_may_be_counted_in_items() -> None:
    b = bench(size=lambda item: 1, target_delay_s=50.0, min_share=0.0)
    for n in range(3):
        b.push("l", BATCH, key=LATE - 20.0 + n, tokens=5000)
        b.push("h", INTERACTIVE, key=LATE - 10.0 + n, tokens=5000)
    for expected in ("hh", "lh", "ll"):
        batch, left = b.queue.peek(2)
        batch = b.control.compose(batch, left, 2, LATE, 0.0)
        assert "".join(item.value for item in batch) == expected
        b.queue.take(batch, LATE)


def test_free_places_are_shared_by_turns() -> None:
    b = bench(size=lambda item: 1, target_delay_s=1e9, min_share=1 / 8)
    served = ""
    for turn in range(80):
        b.push("l", BATCH, key=float(turn))
        b.push("h", INTERACTIVE, key=float(turn) + 0.5)
        batch, left = b.queue.peek(1)  # one place at a time: an eighth of it is saved up for
        batch = b.control.compose(batch, left, 1, LATE, 0.0)
        served += batch[0].value
        b.queue.take(batch, LATE)
    assert 8 <= served.count("l") <= 12


def test_a_large_backlog_is_looked_through_a_few_times_only() -> None:
    looks = 0

    def size(item: QueueItem[str]) -> int:
        nonlocal looks
        looks += 1
        return item.tokens

    b = bench(size=size, target_delay_s=1e9, min_share=1 / 16)
    for n in range(8192):
        b.push("x", n % 5 / 5, key=LATE - 10.0 + n / 8192, tokens=1 + n % 7)
    for _ in range(3):
        assert b.compose(4096)
    assert looks < 3 * 4 * 8192
    b.queue.limits = QueueLimits(class_shares=EVEN, target_delay_s=1.0, standing_s=0.0)
    b.compose(4096)
    assert len(b.queue) == 0
    assert len(b.given_up) > 1000


def test_what_was_given_up_may_come_again() -> None:
    """Whoever is told may queue again at once, and may take others out: the books stay right."""
    b = bench(target_delay_s=1.0, standing_s=0.0)
    items = [b.push(str(n), BATCH, key=float(n)) for n in range(9)]

    def again(error: PimoeError) -> None:
        b.push("again", BATCH, key=LATE)
        b.queue.cancel(items[3])

    items[8].fail = again
    b.compose(1)
    assert b.queue.statistics()[:2] == (1, 1)
    assert b.waiting == "again"
    assert len(b.given_up) == 6  # all but the one that was served, the one that came again and the one taken out


# The published bound


class Overtaking:
    """Watches every dispatch of a batcher: nothing that waits on came so much earlier than what is dispatched."""

    def __init__(self, batcher: Batcher[Any, Any]) -> None:
        self.batcher = batcher
        self.dispatches = self.overtaken = 0
        self._take = batcher.queue.take
        batcher.queue.take = self.take  # type: ignore[method-assign]

    def take(self, batch: list[QueueItem[Any]], now: float | None = None) -> None:
        batcher = self.batcher
        latency = batcher.downstream.latency
        service_s = latency.predict_s(batcher.composer.max_tokens()) or latency.mean_s
        target_s = batcher.composer._overload.target_s(service_s)
        self._take(batch, now)
        self.dispatches += 1
        newest = max(item.arrival for item in batch)
        for _, _, waiting in batcher.queue._groups.get(batch[0].group, ()):
            self.overtaken += newest > waiting.arrival
            bound_s = overtaking_bound_s(waiting.priority, batcher.limits, target_s)
            assert newest - waiting.arrival <= bound_s + 1e-6


async def never(batch: Sequence[int], deadline: float) -> Computed[int]:
    raise AssertionError("only composed")


steps = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.01, 0.1, 0.5, 3.0]),  # time that passes
        st.integers(0, 6),  # that arrive
        st.sampled_from([BATCH, LOW, DEFAULT, HIGH, INTERACTIVE, 0.33]),
        st.sampled_from([1, 2, 5, 11, 30]),  # tokens
        st.sampled_from([0.3, 2.0, 20.0, 1e4]),  # time each has
        st.integers(0, 3),  # batches, which end when the time has passed
    ),
    min_size=5,
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(
    steps,
    st.sampled_from([0.0, 0.3, 2.0]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.1, 5.0]),
    st.sampled_from([0.0, 1 / 16, 1 / 5]),
)
def test_nothing_waits_on_while_what_came_much_later_is_dispatched(
    events: list[tuple[float, int, float, int, float, int]],
    target_delay_s: float,
    standing_s: float,
    margin_s: float,
    min_share: float,
) -> None:
    now = 50.0
    queue_limits = QueueLimits(
        class_shares=EVEN, target_delay_s=target_delay_s, standing_s=standing_s, min_share=min_share
    )
    limits = BatchLimits(max_batch_tokens=10, max_patience_s=2.0, service_margin_s=margin_s)
    batcher: Batcher[int, int] = Batcher(never, limits, queue_limits, lambda: now)
    queue, downstream = batcher.queue, batcher.downstream
    watch = Overtaking(batcher)
    flights: list[Flight] = []
    for passed_s, count, priority, tokens, timeout_s, batches in events:
        now += passed_s
        while flights:
            flight = flights.pop(0)
            downstream.computed(flight, flight.tokens, flight.tokens, now)
            downstream.ended(flight, now)
        for n in range(count):
            deadline = now + timeout_s
            # Much of it patient, and every other one as it may be: backlogs of all classes.
            chosen = priority if n % 2 else BATCH
            key = sort_key(queue_limits, limits, now, deadline, chosen, downstream.latency.predict_s(tokens))
            with contextlib.suppress(OverloadedError):
                queue.push(QueueItem(n, tokens, chosen, now, deadline, key, lambda error: None))
        for _ in range(batches):
            queue.expire(now)
            batch, _left = batcher.composer.compose(now)
            if batch:
                queue.take(batch, now)
                flights.append(downstream.dispatched(sum(item.tokens for item in batch), timeout_s, now))
    assert watch.dispatches or queue.statistics().expired or not any(each[1] and each[5] for each in events)


def test_the_bound_is_needed() -> None:
    """The property above is not empty: much is overtaken, by nearly as much as may be."""
    chance = random.Random(3)
    now = 0.0
    limits = BatchLimits(max_batch_tokens=4, max_patience_s=2.0)
    queue_limits = QueueLimits(class_shares=EVEN, target_delay_s=1.0, standing_s=1e9)
    batcher: Batcher[int, int] = Batcher(never, limits, queue_limits, lambda: now)
    watch = Overtaking(batcher)
    for _ in range(400):
        now += 0.1
        for _ in range(6):
            priority = chance.choice([BATCH, DEFAULT, INTERACTIVE])
            key = sort_key(queue_limits, limits, now, math.inf, priority, 0.0)
            batcher.queue.push(QueueItem(0, 1, priority, now, math.inf, key, lambda error: None))
        batch, _left = batcher.composer.compose(now)
        batcher.queue.take(batch, now)
        flight = batcher.downstream.dispatched(4, math.inf, now)
        batcher.downstream.computed(flight, 4, 4, now + 0.1)
        batcher.downstream.ended(flight, now + 0.1)
    assert watch.overtaken > 1000
    assert batcher.queue.statistics().shed > 100


def test_what_may_not_be_passed_by_is_not_left_out_for_the_most_important_either() -> None:
    now = 0.0
    limits = BatchLimits(max_batch_tokens=4)
    queue_limits = QueueLimits(class_shares=EVEN, target_delay_s=2.0, standing_s=1e9)
    batcher: Batcher[int, int] = Batcher(never, limits, queue_limits, lambda: now)
    Overtaking(batcher)
    for n in range(24):
        flight = batcher.downstream.dispatched(1 + n % 4, math.inf, now)
        now += 0.1 * (1 + n % 4)
        batcher.downstream.computed(flight, flight.tokens, flight.tokens, now)
        batcher.downstream.ended(flight, now)

    def push(priority: float, arrival: float, deadline: float) -> QueueItem[Any]:
        key = sort_key(queue_limits, limits, arrival, deadline, priority, 0.2)
        item: QueueItem[Any] = QueueItem(0, 2, priority, arrival, deadline, key, lambda error: None)
        batcher.queue.push(item)
        return item

    first = push(BATCH, now, now + 600.0)
    now += 10.0  # a standstill; what waits now is soon done
    push(INTERACTIVE, now, now + 0.25)
    push(BATCH, now - 1.0, now + 600.0)
    batch, _left = batcher.composer.compose(now)
    batcher.queue.take(batch, now)
    assert first in batch


class Running:
    """A batcher in virtual time: its batches end when the test says so."""

    def __init__(self, limits: BatchLimits, queue_limits: QueueLimits) -> None:
        self.now = 10.0
        self.gates: list[asyncio.Future[None]] = []
        self.batcher: Batcher[int, int] = Batcher(self.execute, limits, queue_limits, lambda: self.now)
        self.watch = Overtaking(self.batcher)
        self.calls: list[asyncio.Task[int]] = []

    async def execute(self, batch: Sequence[int], deadline: float) -> Computed[int]:
        gate = asyncio.get_running_loop().create_future()
        self.gates.append(gate)
        await gate
        return Computed(batch, len(batch))

    def submit(self, tokens: int, priority: float) -> None:
        self.calls.append(asyncio.create_task(self.batcher.submit(len(self.calls), tokens, priority, 1e4)))

    async def settle(self) -> None:
        for _ in range(8):
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(limits: BatchLimits, queue_limits: QueueLimits) -> AsyncIterator[Running]:
    made = Running(limits, queue_limits)
    made.batcher.start()
    try:
        yield made
    finally:
        await made.batcher.close()
        await within_patience(asyncio.gather(*made.calls, return_exceptions=True))


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("seed", range(6))
async def test_the_bound_holds_for_a_running_batcher(seed: int) -> None:
    chance = random.Random(seed)
    limits = BatchLimits(max_batch_tokens=8, max_patience_s=2.0, max_in_flight=1 + seed % 2)
    async with running(limits, QueueLimits(class_shares=EVEN, target_delay_s=1.0)) as r:
        for _ in range(300):
            r.now += chance.expovariate(20.0)
            for _ in range(chance.randrange(5)):
                r.submit(chance.randint(1, 6), chance.choice([BATCH, LOW, DEFAULT, HIGH, INTERACTIVE]))
            await r.settle()
            if r.gates and chance.random() < 0.6:
                gate = r.gates.pop(0)
                if not gate.done():
                    gate.set_result(None)
                await r.settle()
        assert r.watch.dispatches > 100
        assert r.watch.overtaken > 100
        assert r.batcher.alive
