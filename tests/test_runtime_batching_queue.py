"""The priority queue: order, bounds, shedding, batches; and its books under any sequence of operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from pimoe.runtime.batching import BatchLimits, PriorityQueue, QueueItem, QueueLimits, patience_s
from pimoe.runtime.batching.policy import virtual_deadline
from pimoe.runtime.errors import ConfigurationError, DeadlineExceededError, OverloadedError, PimoeError

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


def queue_of(items: Sequence[Item], max_tokens: int = 1000, max_items: int = 1000) -> PriorityQueue[str]:
    queue: PriorityQueue[str] = PriorityQueue(QueueLimits(max_tokens, max_items))
    for each in items:
        queue.push(each)
    return queue


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
    assert gone == "cba"
    for name in gone:
        (error,) = waiting[name].errors
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s == 1.0
    assert waiting["d"].errors == []
    assert queue.statistics() == (4, 4, 0, 3, 0, 0)


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
    assert queue.statistics() == (2, 10, 1, 0, 0, 0)
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
    assert queue.statistics() == (1, 1, 0, 0, 3, 0)
    assert popped(queue) == "c"


def test_cancelled_items_leave_at_once_wherever_they_are() -> None:
    items = {name: item(name, tokens=10, key=key) for key, name in enumerate("abcde")}
    queue = queue_of(list(items.values()), max_tokens=50)
    for name in "aec":
        queue.cancel(items[name])
        queue.cancel(items[name])
    assert queue.statistics() == (2, 20, 0, 0, 0, 3)
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
    kept = [queue._by_deadline, queue._by_importance, *queue._groups.values()]
    assert all(len(entries) < 100 for entries in kept)
    assert popped(queue) == "stays"
    assert queue._groups == {}


# Batches


def test_a_batch_is_what_fits_of_the_heads_group_in_order() -> None:
    queue = queue_of([item(name, key=key, group="gh"[key % 2]) for key, name in enumerate("abcdef")])
    batch, left_behind = queue.peek_batch(10)
    assert (names(batch), left_behind) == ("ace", False)
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
    queue = queue_of([item(name, tokens=size, key=key) for key, (name, size) in enumerate(sizes.items())])
    batch, left_behind = queue.peek_batch(10)
    assert (names(batch), left_behind) == ("a", True)
    queue.take(batch)
    assert [names(queue.peek_batch(10)[0]), queue.peek_batch(10)[1]] == ["bcd", False]


def test_exactly_full_is_no_lack_of_room() -> None:
    queue = queue_of([item(name, tokens=5, key=key) for key, name in enumerate("ab")])
    assert (names(queue.peek_batch(10)[0]), queue.peek_batch(10)[1]) == ("ab", False)
    queue.push(item("c", tokens=0, key=9.0))
    assert (names(queue.peek_batch(10)[0]), queue.peek_batch(10)[1]) == ("abc", False)
    queue.push(item("d", tokens=1, key=9.0))
    assert (names(queue.peek_batch(10)[0]), queue.peek_batch(10)[1]) == ("abc", True)


def test_a_head_that_is_too_large_comes_alone() -> None:
    queue = queue_of([item("a", tokens=25, key=0), item("b", key=1)])
    batch, left_behind = queue.peek_batch(10)
    assert (names(batch), left_behind) == ("a", True)
    assert PriorityQueue(QueueLimits()).peek_batch(10) == ([], False)


@pytest.mark.parametrize("name", ["max_tokens", "max_items", "retry_after_s"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"queue.{name} is 0"):
        QueueLimits(**{name: 0})


# The books, under anything


class Books(RuleBasedStateMachine):
    """Compares the queue with the plain list of what should be in it."""

    items = Bundle("items")

    def __init__(self) -> None:
        super().__init__()
        self.queue: PriorityQueue[str] = PriorityQueue(QueueLimits(max_tokens=20, max_items=8))
        self.waiting: list[Item] = []
        self.given_up = 0

    @rule(
        target=items,
        tokens=st.integers(0, 25),
        priority=st.sampled_from([0.0, 0.5, 1.0]),
        key=st.integers(0, 5),
        deadline=st.integers(0, 10),
        group=st.integers(0, 2),
    )
    def push(self, tokens: int, priority: float, key: int, deadline: int, group: int) -> Item:
        new = item("", tokens, priority, 0.0, deadline, key, group)
        before = list(self.waiting)
        try:
            self.queue.push(new)
        except OverloadedError:
            assert all(each.waiting for each in before)
            return new
        shed = [each for each in before if not each.waiting]
        kept = [each for each in before if each.waiting]
        for each in shed:
            assert each.priority < priority
            assert [type(error) for error in each.errors] == [OverloadedError]
        assert not shed or min((each.priority for each in kept), default=1.0) >= max(
            each.priority for each in shed
        )
        self.given_up += len(shed)
        self.waiting = [*kept, new]
        return new

    @rule(gone=consumes(items))
    def cancel(self, gone: Item) -> None:
        self.queue.cancel(gone)
        self.waiting = [each for each in self.waiting if each is not gone]

    @rule()
    def pop(self) -> None:
        if self.waiting:
            head = self.queue.pop()
            assert (head.key, head.number) == min((each.key, each.number) for each in self.waiting)
            self.waiting.remove(head)  # type: ignore[arg-type]

    @rule(now=st.integers(0, 10))
    def expire(self, now: int) -> None:
        self.queue.expire(now)
        for late in [each for each in self.waiting if each.deadline <= now]:
            assert [type(error) for error in late.errors] == [DeadlineExceededError]
            self.waiting.remove(late)

    @rule(max_tokens=st.integers(1, 30), take=st.booleans())
    def batch(self, max_tokens: int, take: bool) -> None:
        batch, left_behind = self.queue.peek_batch(max_tokens)
        order = sorted(self.waiting, key=lambda each: (each.key, each.number))
        group = [each for each in order if each.group == order[0].group]
        assert batch == group[: len(batch)]
        assert left_behind == (len(batch) < len(group))
        if left_behind:
            assert sum(each.tokens for each in group[: len(batch) + 1]) > max_tokens
        assert len(batch) <= 1 or sum(each.tokens for each in batch) <= max_tokens
        if take:
            self.queue.take(batch)
            self.waiting = [each for each in self.waiting if each not in batch]

    @invariant()
    def books_are_right(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.tokens == sum(each.tokens for each in self.waiting)
        assert all(each.waiting and not each.errors for each in self.waiting)
        assert len(self.waiting) <= 8
        assert self.queue.tokens <= 20 or len(self.waiting) == 1 or max(each.tokens for each in self.waiting) > 20
        assert (self.queue.head() is None) == (not self.waiting)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
