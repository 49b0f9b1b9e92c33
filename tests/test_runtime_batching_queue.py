"""The priority queue: order, bounds, shedding, batches; and its books under any sequence of operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.batching import BatchLimits, PriorityQueue, QueueItem, QueueLimits, patience_s
from pimoe.runtime.batching.policy import virtual_deadline
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError, PimoeError

LIMITS = BatchLimits(max_patience_s=4.0)


class Item(QueueItem[str]):
    """A queue item that keeps what it was failed with."""

    errors: list[PimoeError]


def item(
    name: str = "",
    tokens: int = 1,
    priority: float = 0.5,
    arrival: float = 0.0,
    deadline: float = math.inf,
    key: float | None = None,
    group: object = None,
) -> Item:
    errors: list[PimoeError] = []
    chosen = virtual_deadline(arrival, deadline, priority, LIMITS) if key is None else key
    made = Item(name, tokens, priority, arrival, deadline, chosen, errors.append, group)  # type: ignore[arg-type]
    made.errors = errors
    return made


def queue_of(
    items: Sequence[Item],
    max_tokens: int = 1000,
    max_items: int = 1000,
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0),
) -> PriorityQueue[str]:
    queue: PriorityQueue[str] = PriorityQueue(QueueLimits(max_tokens, max_items, class_shares=shares))
    for each in items:
        queue.push(each)
    return queue


def counts(queue: PriorityQueue[str]) -> tuple[int, ...]:
    """Items, tokens, refused, shed, expired, cancelled."""
    items, tokens, refused, shed, expired, cancelled, *_ = queue.statistics()
    return items, tokens, refused, shed, expired, cancelled


def names(items: Sequence[QueueItem[str]]) -> str:
    return "".join(each.value for each in items)


def popped(queue: PriorityQueue[str]) -> str:
    return "".join(queue.pop().value for _ in range(len(queue)))


# Order


def test_the_smallest_key_is_served_first_and_equal_keys_in_order_of_arrival() -> None:
    keys = {"d": 4.0, "a": 1.0, "c": 2.0, "b": 1.5}
    queue = queue_of([item(name, key=key) for name, key in keys.items()] + [item(n, key=1.0) for n in "xyz"])
    assert queue.head() is not None
    assert queue.head().value == "a"  # type: ignore[union-attr]
    assert popped(queue) == "axyzbcd"
    assert queue.head() is None
    with pytest.raises(IndexError):
        queue.pop()


arrivals = st.lists(st.tuples(st.floats(0, 10), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=2, max_size=30)


@given(arrivals)
def test_nothing_starves_beyond_the_difference_of_patiences(requests: list[tuple[float, float]]) -> None:
    queue = queue_of([item(str(n), arrival=at, priority=priority) for n, (at, priority) in enumerate(requests)])
    order = [queue.pop() for _ in range(len(requests))]
    for position, later in enumerate(order):
        for earlier in order[:position]:
            if earlier.arrival > later.arrival:  # it overtook
                difference = patience_s(later.priority, 4.0) - patience_s(earlier.priority, 4.0)
                assert earlier.arrival - later.arrival <= difference + 1e-9


def test_one_of_low_priority_is_served_under_a_stream_of_urgent_work() -> None:
    queue = queue_of([item("low", priority=0.0, arrival=0.0)])
    for tenth in range(1, 100):
        queue.push(item("urgent", priority=1.0, arrival=tenth / 10))
        if queue.pop().value == "low":
            break
    assert tenth == 40  # what came within the 4 seconds between the patiences went before it, and no more


def test_an_item_is_queued_once() -> None:
    again = item("a")
    queue = queue_of([again])
    with pytest.raises(ValueError, match="only once"):
        queue.push(again)
    assert (len(queue), queue.tokens) == (1, 1)
    assert queue.pop() is again
    with pytest.raises(ValueError, match="only once"):
        queue.push(again)
    assert (len(queue), queue.tokens) == (0, 0)


# Bounds


def test_the_incoming_is_refused_where_nothing_is_less_important() -> None:
    queue = queue_of([item("a", 5), item("b", 5, priority=1.0)], max_tokens=10)
    refused = item("c", priority=0.5)
    with pytest.raises(OverloadedError) as raised:
        queue.push(refused)
    assert raised.value.retry_after_s == 1.0
    assert (queue.tokens, queue.statistics().refused, queue.statistics().shed) == (10, 1, 0)
    assert not refused.waiting
    queue.cancel(refused)
    assert queue.statistics().cancelled == 0
    queue.pop()
    queue.push(refused)  # there is room now
    assert len(queue) == 2


def test_the_newest_of_the_lowest_priority_is_shed_first() -> None:
    waiting = {
        name: item(name, priority=priority) for name, priority in zip("abcd", (0.25, 0.0, 0.0, 0.5), strict=True)
    }
    queue = queue_of(list(waiting.values()), max_items=4)
    gone = ""
    for _ in range(3):
        queue.push(item("x", priority=1.0))
        gone += "".join(name for name in "abcd" if not waiting[name].waiting and name not in gone)
    assert gone == "cba"  # the low class is above the batch class
    for name in gone:
        (error,) = waiting[name].errors
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s == 1.0
    assert waiting["d"].errors == []
    assert counts(queue) == (4, 4, 0, 3, 0, 0)


def test_only_as_many_are_shed_as_must_go() -> None:
    small = [item(str(n), tokens=4, priority=0.0) for n in range(5)]
    queue = queue_of(small, max_tokens=20)
    queue.push(item("x", tokens=7, priority=1.0))
    assert [each.waiting for each in small] == [True, True, True, False, False]
    assert queue.tokens == 19


def test_nobody_is_shed_for_one_that_is_refused_all_the_same() -> None:
    low, equal = item("low", tokens=2, priority=0.0), item("equal", tokens=8)
    queue = queue_of([low, equal], max_tokens=10)
    with pytest.raises(OverloadedError):
        queue.push(item("big", tokens=5, priority=0.5))
    assert low.waiting
    assert low.errors == []
    assert counts(queue) == (2, 10, 1, 0, 0, 0)
    queue.push(item("small", tokens=2, priority=0.25))  # the order of shedding survived
    assert not low.waiting


def test_one_that_is_larger_than_the_queue_comes_in_alone() -> None:
    queue = queue_of([item("huge", tokens=5000)], max_tokens=1000)
    assert queue.tokens == 5000
    with pytest.raises(OverloadedError):
        queue.push(item("a"))
    queue.pop()
    queue.push(item("a", priority=0.0))
    queue.push(item("huge", tokens=5000, priority=1.0))  # sheds all that is less important
    assert popped(queue) == "huge"


# Deadlines and leaving


def test_what_is_late_is_failed_and_the_rest_stays() -> None:
    items = {
        name: item(name, deadline=deadline) for name, deadline in zip("abcd", (3.0, 1.0, 5.0, 1.5), strict=True)
    }
    queue = queue_of(list(items.values()))
    queue.expire(1.0)
    assert [name for name, each in items.items() if each.errors] == ["b"]
    queue.expire(3.0)
    assert [name for name, each in items.items() if each.errors] == ["a", "b", "d"]
    assert all(isinstance(items[name].errors[0], DeadlineExceededError) for name in "abd")
    assert [len(each.errors) for each in items.values()] == [1, 1, 0, 1]
    assert counts(queue) == (1, 1, 0, 0, 3, 0)
    assert popped(queue) == "c"


def test_cancelled_items_leave_at_once_wherever_they_are() -> None:
    items = {name: item(name, tokens=10, key=key) for key, name in enumerate("abcde")}
    queue = queue_of(list(items.values()), max_tokens=50)
    for name in "aec":
        queue.cancel(items[name])
        queue.cancel(items[name])
    assert counts(queue) == (2, 20, 0, 0, 0, 3)
    queue.push(item("f", tokens=30, key=9.0))
    assert popped(queue) == "bdf"
    assert all(each.errors == [] for each in items.values())


def test_draining_fails_everything_once() -> None:
    items = [item(str(n), group=n % 2) for n in range(5)]
    queue = queue_of(items)
    error = PimoeError("over")
    queue.drain(error)
    assert [each.errors for each in items] == [[error]] * 5
    assert (len(queue), queue.tokens) == (0, 0)


def test_what_left_does_not_pile_up() -> None:
    queue = queue_of([item("stays", key=-1.0, priority=0.0, deadline=1e9)])
    for n in range(10_000):
        passing = item("passes", key=float(n), deadline=1e6 + n)
        queue.push(passing)
        queue.cancel(passing)
    kept = [queue._by_deadline, queue._by_importance, *queue._by_class, *queue._groups.values()]
    assert all(len(entries) < 100 for entries in kept)
    assert popped(queue) == "stays"
    assert queue._groups == {}


# Batches


def test_a_batch_is_what_fits_of_the_heads_group_in_order() -> None:
    queue = queue_of([item(name, key=key, group="gh"[key % 2]) for key, name in enumerate("abcdef")])
    batch, left_behind = queue.peek_batch(10)
    assert (names(batch), left_behind) == ("ace", None)
    assert len(queue) == 6  # nothing is taken out by looking
    assert names(queue.peek_batch(10)[0]) == "ace"
    queue.take(batch)
    assert names(queue.peek_batch(10)[0]) == "bdf"
    assert (len(queue), queue.tokens) == (3, 3)


def test_the_head_decides_the_group_wherever_it_came() -> None:
    queue = queue_of([item("a", key=5.0, group=1), item("b", key=6.0, group=2), item("c", key=1.0, group=2)])
    assert names(queue.peek_batch(10)[0]) == "cb"


def test_big_items_are_not_passed_by_small_ones() -> None:
    sizes = {"a": 4, "b": 8, "c": 1, "d": 1}
    items = {name: item(name, tokens=size, key=key) for key, (name, size) in enumerate(sizes.items())}
    queue = queue_of(list(items.values()))
    batch, left_behind = queue.peek_batch(10)
    assert names(batch) == "a"
    assert left_behind is items["b"]
    queue.take(batch)
    batch, left_behind = queue.peek_batch(10)
    assert (names(batch), left_behind) == ("bcd", None)


def test_small_ones_fill_what_a_big_one_that_is_not_late_cannot_use() -> None:
    sizes = {"a": 4, "b": 8, "c": 5, "d": 9, "e": 1, "f": 1}
    items = {name: item(name, tokens=size, key=key) for key, (name, size) in enumerate(sizes.items())}
    queue = queue_of(list(items.values()))
    batch, left = queue.peek_batch(10, now=0.5)
    assert names(batch) == "ace"  # and with that it is full
    assert left is items["b"]
    assert names(queue.peek_batch(10, now=2.5)[0]) == "a"  # b is late: nobody passes it by
    assert names(queue.peek_batch(11, now=0.5)[0]) == "acef"
    queue.take(batch)
    assert names(queue.peek_batch(10, now=0.5)[0]) == "bf"


def test_what_fills_a_batch_is_not_looked_for_without_end() -> None:
    queue = queue_of([item("a"), *(item("B", tokens=10) for _ in range(31)), item("c"), item("B", tokens=10)])
    assert names(queue.peek_batch(10, now=-1.0)[0]) == "ac"
    queue.push(item("B", tokens=10, key=-9.0))
    queue.push(item("a", key=-10.0))
    assert names(queue.peek_batch(10, now=-20.0)[0]) == "aa"  # now there are too many in between


def test_exactly_full_is_no_lack_of_room() -> None:
    queue = queue_of([item(name, tokens=5, key=key) for key, name in enumerate("ab")])
    batch, left_behind = queue.peek_batch(10)
    assert (names(batch), left_behind) == ("ab", None)
    one_more = item("c", tokens=1, key=9.0)
    queue.push(one_more)
    batch, left_behind = queue.peek_batch(10)
    assert names(batch) == "ab"
    assert left_behind is one_more


def test_a_head_that_is_too_large_comes_alone() -> None:
    big, small = item("a", tokens=25, key=0), item("b", key=1)
    assert queue_of([big, small]).peek_batch(10) == ([big], small)
    assert PriorityQueue(QueueLimits()).peek_batch(10) == ([], None)


def test_a_batch_ends_where_it_would_not_be_done_in_time() -> None:
    deadlines = {"a": 9.0, "b": 5.0, "c": 3.0, "d": 9.0}
    items = [item(name, tokens=2, key=n, deadline=at) for n, (name, at) in enumerate(deadlines.items())]
    queue = queue_of(items)
    asked: list[tuple[int, float]] = []

    def fits(tokens: int, deadline: float) -> bool:
        asked.append((tokens, deadline))
        return tokens < deadline

    batch, left = queue.peek_batch(100, fits)
    assert names(batch) == "ab"
    assert left is items[2]
    assert asked == [(4, 5.0), (6, 3.0)]  # the head is not asked about: it comes in any case
    assert names(queue.peek_batch(3, fits)[0]) == "a"


def test_the_first_places() -> None:
    queue = queue_of([item(name, tokens=100, key=n) for n, name in enumerate("abc")])
    first, left = queue.peek(2)
    assert (names(first), left and left.value) == ("ab", "c")
    first, left = queue.peek(3)
    assert (names(first), left) == ("abc", None)
    assert PriorityQueue(QueueLimits()).peek(3) == ([], None)


def test_what_is_overdue_in_a_group() -> None:
    queue = queue_of([item(name, key=n, group=n % 2) for n, name in enumerate("abcdef")])
    assert names(list(queue.overdue(4.0, 0))) == "ac"
    assert names(list(queue.overdue(4.5, 0))) == "ace"
    assert list(queue.overdue(4.5, "none")) == []
    assert sorted(map(str, queue.groups())) == ["0", "1"]


# When to come again


def test_the_backlog_over_the_rate_says_when_to_come_again() -> None:
    queue = queue_of([item("a", 40, priority=1.0), item("b", 40, priority=0.5), item("c", 40, priority=0.0)])
    one_more = {priority: item("x", 10, priority=priority) for priority in (0.0, 0.5, 1.0)}
    assert [queue.retry_after_s(each) for each in one_more.values()] == [1.0, 1.0, 1.0]
    for at in (0.0, 1.0, 2.0):
        queue.drain_rate.left(20, True, at)
    assert [queue.retry_after_s(each) for each in one_more.values()] == pytest.approx([6.5, 4.5, 2.5])
    queue.limits = QueueLimits(order="fifo")
    assert [queue.retry_after_s(each) for each in one_more.values()] == pytest.approx([6.5, 6.5, 6.5])


@pytest.mark.parametrize(("tokens", "told_s"), [(10**9, 60.0), (1, 0.001)])
def test_nobody_is_sent_away_for_ever_or_told_to_come_at_once(tokens: int, told_s: float) -> None:
    queue = queue_of([])
    for at in (0.0, 1.0):
        queue.drain_rate.left(10**6, True, at)
    assert queue.retry_after_s(item("x", tokens)) == told_s


def test_the_rate_is_of_what_is_taken_while_others_wait() -> None:
    queue = queue_of([item(str(n), 30) for n in range(4)])
    for at in (0.0, 1.5, 3.0):
        queue.pop(at)
    assert queue.statistics().tokens_per_s == pytest.approx(20.0)
    pair = queue_of([item("a", 30), item("b", 30)])
    pair.pop(0.0)
    assert pair.statistics().tokens_per_s == 0.0
    pair.pop(1.5)  # the last one: it was waited for all the same
    assert pair.statistics().tokens_per_s == pytest.approx(20.0)


# Classes


def test_no_class_holds_more_than_its_share() -> None:
    queue = queue_of([], max_tokens=100, shares=(0.5, 0.6, 0.8, 0.9, 1.0))
    for priority, share in ((0.0, 50), (0.2, 60)):
        queue.push(item("a", tokens=share - 20, priority=priority))
    assert queue.tokens == 70
    with pytest.raises(OverloadedError, match="of requests of this priority"):
        queue.push(item("b", tokens=21, priority=0.0))
    with pytest.raises(OverloadedError, match="of requests of this priority"):
        queue.push(item("b", tokens=21, priority=0.2))
    queue.push(item("c", tokens=20, priority=0.2))
    assert queue.tokens == 90
    with pytest.raises(OverloadedError, match="work at least as important"):
        queue.push(item("b", tokens=11, priority=0.0))
    queue.push(item("d", tokens=100, priority=1.0))
    assert [each["tokens"] for each in queue.statistics().classes.values()] == [0, 0, 0, 0, 100]


def test_a_full_class_does_not_shed_lower_ones_for_its_own() -> None:
    low = item("low", tokens=10, priority=0.0)
    queue = queue_of([low, item("a", tokens=80)], max_tokens=100, shares=(0.5, 0.6, 0.8, 0.9, 1.0))
    with pytest.raises(OverloadedError, match="of requests of this priority"):
        queue.push(item("b", tokens=20))
    assert low.waiting


@pytest.mark.parametrize("priority", [0.0, 1.0])
def test_the_ends_of_the_priorities_are_priorities(priority: float) -> None:
    only = item("a", priority=priority)
    queue = queue_of([only])
    assert queue.statistics().classes["batch" if priority == 0.0 else "interactive"]["items"] == 1
    assert queue.pop() is only


# Limits that change while something waits


def test_limits_below_what_waits_shed_nothing_by_themselves() -> None:
    items = [item(str(n), tokens=10, priority=0.0) for n in range(10)]
    queue = queue_of(items)
    queue.limits = QueueLimits(max_tokens=20, max_items=3)
    assert len(queue) == 10
    with pytest.raises(OverloadedError):
        queue.push(item("a", priority=0.0))
    assert len(queue) == 10
    queue.push(item("b", tokens=10, priority=1.0))
    assert counts(queue) == (2, 20, 1, 9, 0, 0)
    assert [each.waiting for each in items] == [True] + [False] * 9  # the oldest stayed
    queue.limits = QueueLimits(max_tokens=1000)
    queue.push(item("c", tokens=100, priority=0.0))
    assert queue.tokens == 120


def test_who_is_shed_does_not_depend_on_the_order_when_it_was_queued() -> None:
    queue = queue_of([])
    queue.limits = QueueLimits(max_items=3, class_shares=(1.0,) * 5, order="fifo")
    low, high = item("low", priority=0.0), item("high", priority=1.0)
    queue.push(low)
    queue.push(high)
    queue.push(item("x", priority=1.0))
    with pytest.raises(OverloadedError):  # in order of arrival nobody goes for anybody
        queue.push(item("y", priority=1.0))
    queue.limits = QueueLimits(max_items=3, class_shares=(1.0,) * 5)
    queue.push(item("z", priority=0.9))
    assert (low.waiting, high.waiting) == (False, True)


# Whoever is told may do anything


def test_whoever_is_shed_may_queue_again_at_once() -> None:
    queue = queue_of([], max_items=2)

    def push_again(error: PimoeError) -> None:
        assert isinstance(error, OverloadedError)
        queue.push(item("A", priority=1.0))

    for name in "ab":
        low = item(name, priority=0.0)
        low.fail = push_again
        queue.push(low)
    queue.push(item("c", priority=0.5))  # b goes; A comes, for which a goes; the next A pushes c out
    assert popped(queue) == "AA"
    assert counts(queue) == (0, 0, 0, 3, 0, 0)


@pytest.mark.parametrize("how", ["expire", "drain", "shed"])
def test_whoever_is_told_may_take_others_out_and_queue_new_ones(how: str) -> None:
    items = [item(str(n), deadline=5.0) for n in range(6)]
    queue = queue_of(items)
    new: list[Item] = []

    def upset(error: PimoeError) -> None:
        for each in items:
            queue.cancel(each)
        new.append(item("new", deadline=5.0))
        queue.push(new[-1])

    for each in items:
        each.fail = upset
    if how == "shed":
        for each in items:
            queue.shed(each)
    elif how == "expire":
        queue.expire(5.0)
    else:
        queue.drain(PimoeError("over"))
    assert not any(each.waiting for each in items)
    assert len(queue) == len(new) == (1 if how == "shed" else 6)
    assert popped(queue) == "new" * len(new)
    assert counts(queue)[:2] == (0, 0)
    assert queue.statistics().shed + queue.statistics().expired + queue.statistics().cancelled == (
        0 if how == "drain" else 6
    )


def test_thousands_of_equal_keys_are_served_in_order_of_arrival() -> None:
    items = [item(tokens=1, key=1.0) for _ in range(5000)]
    queue = queue_of(items, max_tokens=10**6, max_items=10**4)
    for each in items[::2]:
        queue.cancel(each)
    assert queue.peek_batch(10**6)[0] == items[1::2]
    assert [queue.pop() for _ in range(2500)] == items[1::2]
