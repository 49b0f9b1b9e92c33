"""The queue and the batcher under any sequence of operations, against naive models.

With `test_runtime_caching_stateful` at least 100,000 operations are run each time, and counted.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pimoe.runtime.batching import (
    CLASS_NAMES,
    Batcher,
    BatchLimits,
    Computed,
    OverloadControl,
    PriorityQueue,
    QueueItem,
    QueueLimits,
)
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidTensorError,
    OverloadedError,
    PimoeError,
    RequestCancelledError,
)
from waiting import leave_modules_to_themselves

OPERATIONS: Counter[str] = Counter()
LEAST = {"queue": 50_000, "batcher": 25_000}

# Runs are long, and the same every time; long ones may exceed the engine's store of choices.
LONG = settings(
    deadline=None,
    derandomize=True,
    database=None,
    stateful_step_count=250,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

PRIORITIES = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0])
SHARES = st.sampled_from([(1.0,) * 5, (0.5, 0.6, 0.8, 0.9, 1.0), (0.1, 0.2, 0.3, 0.4, 0.5)])
QUEUE_LIMITS = st.builds(
    QueueLimits,
    max_tokens=st.integers(5, 60),
    max_items=st.integers(1, 20),
    class_shares=SHARES,
    target_delay_s=st.sampled_from([0.0, 1.0, 5.0]),
    standing_s=st.sampled_from([0.0, 2.0]),
    min_share=st.sampled_from([0.0, 1 / 16, 1 / 5]),
    order=st.sampled_from(["priority", "priority", "priority", "fifo"]),
)


class Item(QueueItem[int]):
    """A queue item that keeps what it was failed with."""

    errors: list[PimoeError]


class QueueMachine(RuleBasedStateMachine):
    """The queue against a list of what should be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: PriorityQueue[int] = PriorityQueue(QueueLimits(max_tokens=40, max_items=12))
        self.control: OverloadControl[int] = OverloadControl(self.queue, lambda item: item.tokens)
        self.waiting: list[Item] = []
        self.fates: Counter[str] = Counter()
        self.now = 0.0
        self.pushed = 0

    def left(self, items: Sequence[Any], fate: str, error: type[PimoeError] | None) -> None:
        """These are gone, each was told once (or not at all), and nobody else is gone or was told."""
        for item in items:
            assert not item.waiting
            assert [type(each) for each in item.errors] == ([error] if error else [])
        gone = {id(item) for item in items}
        assert len(gone) == len(items)
        before = len(self.waiting)
        self.waiting = [item for item in self.waiting if id(item) not in gone]
        assert before - len(self.waiting) == len(items)
        self.fates[fate] += len(items)

    def order(self) -> list[Item]:
        return sorted(self.waiting, key=lambda item: (item.key, item.number))

    def naive_victims(self, new: Item) -> list[Item] | None:
        """Who goes for a new item; None: it is refused."""
        limits = self.queue.limits
        peers = [item for item in self.waiting if item.rank == new.rank]
        if limits.prioritised and peers:
            share = limits.class_shares[new.rank]
            tokens = sum(item.tokens for item in peers) + new.tokens
            if len(peers) + 1 > limits.max_items * share or tokens > limits.max_tokens * share:
                return None
        kept, victims = list(self.waiting), []
        while kept and (
            len(kept) >= limits.max_items or sum(item.tokens for item in kept) + new.tokens > limits.max_tokens
        ):
            victim = min(kept, key=lambda item: (item.rank, -item.number))
            if not limits.prioritised or victim.rank >= new.rank:
                return None
            kept.remove(victim)
            victims.append(victim)
        return victims

    @rule(
        tokens=st.integers(1, 25),
        priority=PRIORITIES,
        patience=st.integers(0, 6),
        timeout=st.sampled_from([1.0, 5.0, 50.0]),
        group=st.sampled_from("aab"),
    )
    def push(self, tokens: int, priority: float, patience: int, timeout: float, group: str) -> None:
        OPERATIONS["queue"] += 1
        errors: list[PimoeError] = []
        new = Item(
            self.pushed,
            tokens,
            priority,
            self.now,
            self.now + timeout,
            self.now + patience,
            errors.append,
            group,
        )
        new.errors = errors
        self.pushed += 1
        victims = self.naive_victims(new)
        if victims is None:
            with pytest.raises(OverloadedError) as refused:
                self.queue.push(new)
            assert 0 < (refused.value.retry_after_s or 0) <= 60.0
            assert not new.waiting
            self.fates["refused"] += 1
            self.left([], "shed", OverloadedError)
            return
        self.queue.push(new)
        self.left(victims, "shed", OverloadedError)
        self.waiting.append(new)

    @rule(priorities=st.lists(PRIORITIES, min_size=2, max_size=8), late_s=st.sampled_from([0.0, 1.5, 8.0]))
    def push_many(self, priorities: list[float], late_s: float) -> None:
        """A backlog of all classes, which is late soon."""
        for place, priority in enumerate(priorities):
            self.push(1 + place % 4, priority, place % 3, 50.0, "a")
        self.now += late_s

    @precondition(lambda self: self.waiting)
    @rule(place=st.integers(0, 30), twice=st.booleans())
    def cancel(self, place: int, twice: bool) -> None:
        OPERATIONS["queue"] += 1
        item = self.waiting[place % len(self.waiting)]
        self.queue.cancel(item)
        if twice:
            self.queue.cancel(item)
        self.left([item], "cancelled", None)
        with pytest.raises(ValueError, match="only once"):
            self.queue.push(item)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0]))
    def expire(self, seconds: float) -> None:
        OPERATIONS["queue"] += 1
        self.now += seconds
        self.queue.expire(self.now)
        late = [item for item in self.waiting if item.deadline <= self.now]
        self.left(late, "expired", DeadlineExceededError)

    @rule(places=st.sets(st.integers(0, 30), max_size=4))
    def drop_late(self, places: set[int]) -> None:
        OPERATIONS["queue"] += 1
        late = [item for place, item in enumerate(self.waiting) if place in places]
        self.queue.drop_late([*late])
        self.left(late, "expired", DeadlineExceededError)

    @precondition(lambda self: self.waiting)
    @rule()
    def pop(self) -> None:
        OPERATIONS["queue"] += 1
        first = self.order()[0]
        assert self.queue.head() is first
        assert self.queue.pop(self.now) is first
        self.left([first], "served", None)

    @precondition(lambda self: self.waiting)
    @rule(place=st.integers(0, 30))
    def shed(self, place: int) -> None:
        OPERATIONS["queue"] += 1
        item = self.waiting[place % len(self.waiting)]
        self.queue.shed(item)
        self.left([item], "shed", OverloadedError)
        self.queue.shed(item)

    @rule(max_tokens=st.integers(1, 40), strict=st.booleans(), take=st.booleans())
    def batch(self, max_tokens: int, strict: bool, take: bool) -> None:
        OPERATIONS["queue"] += 1
        batch, left = self.peek(max_tokens, math.inf if strict else self.now)
        if take:
            self.queue.take(batch, self.now)
            self.left(batch, "served", None)
            assert left is None or left.waiting

    def peek(
        self, max_tokens: int, now: float, head: QueueItem[int] | None = None
    ) -> tuple[list[QueueItem[int]], QueueItem[int] | None]:
        """What goes together: all in order that fits, but nothing behind what is late and does not."""
        batch, left = self.queue.peek_batch(max_tokens, now=now, head=head)
        order = self.order()
        group = head.group if head is not None else order[0].group if order else None
        expected: list[QueueItem[int]] = []
        passed: list[QueueItem[int]] = []
        for item in order:
            if item.group != group:
                continue
            if not expected or sum(each.tokens for each in expected) + item.tokens <= max_tokens:
                expected.append(item)
                continue
            passed.append(item)
            if item.key < now:
                break
        assert batch == expected
        assert left is (passed[0] if passed else None)
        return batch, left

    @rule(room=st.integers(1, 40), service_s=st.sampled_from([0.0, 0.1, 1.0]))
    def serve(self, room: int, service_s: float) -> None:
        """A batch under overload control, as the batcher takes it."""
        OPERATIONS["queue"] += 1
        head = self.head(room)
        batch, left = self.peek(room, self.now, head)
        backlog_s = self.queue.tokens / room * service_s
        chosen = self.control.compose(batch, left, room, self.now, service_s, backlog_s)
        assert bool(chosen) == bool(batch)
        assert all(item.waiting and item.group == batch[0].group for item in chosen)
        assert chosen == sorted(chosen, key=lambda item: (item.key, item.number))
        assert len(chosen) <= 1 or sum(item.tokens for item in chosen) <= room
        if left is None or left.key >= self.now or not self.queue.limits.prioritised:
            assert chosen == batch
        shed = [item for item in self.waiting if not item.waiting]
        for item in shed:
            limit_s = min(self.control.target_s(service_s), (item.deadline - item.arrival) / 2)
            assert min(self.now - item.key, backlog_s) > limit_s
        assert self.queue.limits.prioritised or not shed
        self.left(shed, "shed", OverloadedError)
        self.queue.take(chosen, self.now)
        self.left(chosen, "served", None)

    def head(self, room: int) -> QueueItem[int] | None:
        """Whose group is next: the first by key, or, of another group, the first of the highest class that has
        anything late."""
        head, order = self.control.next_head(room, self.now), self.order()
        if not order:
            assert head is None
            return None
        late = [item for item in order if item.key < self.now and item.rank > order[0].rank]
        if late and self.queue.limits.prioritised:
            assert head in (order[0], min(late, key=lambda item: (-item.rank, item.key, item.number)))
        else:
            assert head is order[0]
        firsts = [self.queue.first_of_class(rank) for rank in range(len(CLASS_NAMES))]
        assert firsts == [
            next((item for item in order if item.rank == rank), None) for rank in range(len(CLASS_NAMES))
        ]
        return head

    @rule(limits=QUEUE_LIMITS)
    def change_limits(self, limits: QueueLimits) -> None:
        OPERATIONS["queue"] += 1
        self.queue.limits = limits

    @rule(really=st.integers(0, 9))
    def drain(self, really: int) -> None:
        if really == 0:
            OPERATIONS["queue"] += 1
            self.queue.drain(RequestCancelledError("over"))
            self.left(list(self.waiting), "drained", RequestCancelledError)
            assert self.queue.head() is None

    @invariant()
    def books_are_true(self) -> None:
        queue, statistics = self.queue, self.queue.statistics()
        tokens = sum(item.tokens for item in self.waiting)
        assert (len(queue), queue.tokens) == (len(self.waiting), tokens) == statistics[:2]
        assert all(item.waiting and not item.errors for item in self.waiting)
        for rank, name in enumerate(CLASS_NAMES):
            sizes = [item.tokens for item in self.waiting if item.rank == rank]
            books = statistics.classes[name]
            assert (books["items"], books["tokens"]) == (len(sizes), sum(sizes))
        for fate in ("refused", "shed", "expired", "cancelled"):
            assert getattr(statistics, fate) == self.fates[fate]
        waits = sum(sum(books["waits"]["counts"]) for books in statistics.classes.values())
        assert waits == self.fates["served"]

    @invariant()
    def nothing_piles_up(self) -> None:
        queue = self.queue
        assert max(map(len, (queue._by_deadline, queue._by_importance, *queue._by_class))) <= 65 + 2 * len(queue)
        assert all(queue._groups.values())
        assert sum(map(len, queue._groups.values())) == len(queue)

    def teardown(self) -> None:
        assert self.pushed == len(self.waiting) + sum(self.fates.values())


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time is moved by hand: timers fire without anybody waiting."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class Call:
    """One submitted item, and all that became of it."""

    def __init__(self, value: int, tokens: int, deadline: float) -> None:
        self.value, self.tokens, self.deadline = value, tokens, deadline
        self.computed = 0
        self.left = False
        self.task: asyncio.Task[int] | None = None


class BatcherMachine(RuleBasedStateMachine):
    """The batcher in virtual time, with a model that ends each batch in the way that a rule says."""

    def __init__(self) -> None:
        super().__init__()
        leave_modules_to_themselves()
        self.loop = VirtualLoop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.calls: list[Call] = []
        self.running: list[tuple[list[int], asyncio.Future[Any]]] = []
        self.limits = BatchLimits(max_batch_tokens=12, max_wait_s=0.5, max_patience_s=2.0)
        self.servers = 0  # not known
        self.begin()

    def begin(self) -> None:
        async def start() -> None:
            queue_limits = QueueLimits(max_tokens=60, max_items=20)
            self.batcher: Batcher[int, int] = Batcher(
                self.execute,
                self.limits,
                queue_limits,
                self.loop.time,
                (lambda: self.servers) if self.servers else None,
            )
            self.batcher.start()

        self.loop.run_until_complete(start())

    async def execute(self, values: Sequence[int], deadline: float) -> Computed[int]:
        limits, calls = self.batcher.limits, [self.calls[value] for value in values]
        assert len(self.running) < limits.max_in_flight
        assert len(calls) == 1 or sum(call.tokens for call in calls) <= limits.max_batch_tokens
        assert deadline == max(call.deadline for call in calls) > self.loop.now
        for call in calls:
            call.computed += 1
            assert not call.left
        gate = self.loop.create_future()
        self.running.append((list(values), gate))
        try:
            answer = await gate
        finally:
            self.running = [entry for entry in self.running if entry[1] is not gate]
        if isinstance(answer, Exception):
            raise answer
        return Computed([-value for value in values][: len(values) + answer])

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(7):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def count(self) -> None:
        OPERATIONS["batcher"] += 1

    @precondition(lambda self: len(self.calls) < 400)
    @rule(
        tokens=st.integers(1, 16),
        priority=PRIORITIES,
        timeout_s=st.sampled_from([0.2, 3.0, 50.0, 50.0]),
        group=st.sampled_from("aab"),
    )
    def submit(self, tokens: int, priority: float, timeout_s: float, group: str) -> None:
        self.count()
        self._submit(tokens, priority, timeout_s, group)
        self.settle()

    def _submit(self, tokens: int, priority: float, timeout_s: float, group: str) -> Call:
        call = Call(len(self.calls), tokens, self.loop.now + timeout_s)
        self.calls.append(call)
        coroutine = self.batcher.submit(call.value, tokens, priority, timeout_s, group)
        call.task = self.loop.create_task(coroutine)
        return call

    @precondition(lambda self: len(self.calls) < 400)
    @rule(priorities=st.lists(PRIORITIES, min_size=2, max_size=12), tokens=st.integers(1, 8))
    def submit_many(self, priorities: list[float], tokens: int) -> None:
        """A backlog of all classes at once."""
        for place, priority in enumerate(priorities):
            self.count()
            self._submit(1 + (place + tokens) % 8, priority, 50.0, "a")
        self.settle()

    @precondition(lambda self: len(self.calls) < 400)
    @rule()
    def serve_steadily(self) -> None:
        """Batches that take as long as they are large, until that is known."""
        for n in range(12):
            self.count()
            self._submit(1 + n % 4, 0.5, 50.0, "a")
            self.settle()
            for _, gate in list(self.running):
                self.loop.now += 0.1 * (1 + n % 4)
                if not gate.done():  # its callers may have run out of time meanwhile
                    gate.set_result(0)
                self.settle()

    @precondition(lambda self: len(self.calls) < 400)
    @rule(turns=st.integers(0, 4), tokens=st.integers(1, 4))
    def submit_and_leave(self, turns: int, tokens: int) -> None:
        """Perhaps while its batch is formed and not yet begun."""
        self.count()

        async def wait() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        call = self._submit(tokens, 1.0, 50.0, "a")
        other = self._submit(tokens, 1.0, 50.0, "a")
        self.loop.run_until_complete(wait())
        assert call.task is not None
        assert other.task is not None
        call.left = call.task.cancel()
        self.settle()
        assert call.task.cancelled() or not call.left or call.task.exception()

    @precondition(lambda self: any(not call.task.done() for call in self.calls))
    @rule(place=st.integers(0, 30))
    def leave(self, place: int) -> None:
        self.count()
        pending = [call for call in self.calls if call.task is not None and not call.task.done()]
        call = pending[place % len(pending)]
        assert call.task is not None
        call.task.cancel()
        self.settle()
        call.left = True
        assert call.task.cancelled()

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.count()
        self.loop.now += seconds
        self.settle()
        for call in self.calls[-60:]:
            assert call.task is not None
            assert call.task.done() or call.deadline > self.loop.now

    @precondition(lambda self: self.running)
    @rule(
        place=st.integers(0, 5),
        answer=st.sampled_from([0, 0, 0, 0, -1, InvalidTensorError("no"), ValueError("secret")]),
    )
    def end_batch(self, place: int, answer: int | Exception) -> None:
        """It completes, gives too few results, or fails."""
        self.count()
        values, gate = self.running[place % len(self.running)]
        gate.set_result(answer)
        self.settle()
        for value in values:
            call = self.calls[value]
            assert call.task is not None
            assert call.task.done()
            if not call.task.cancelled():
                error = call.task.exception()
                assert call.left or bool(error) == bool(answer) or isinstance(error, DeadlineExceededError)

    @precondition(lambda self: self.batcher._running)
    @rule(place=st.integers(0, 5))
    def cancel_batch(self, place: int) -> None:
        self.count()
        tasks = sorted(self.batcher._running, key=lambda task: task.get_name())
        tasks[place % len(tasks)].cancel()
        self.settle()

    @rule(
        max_batch_tokens=st.integers(4, 20),
        max_wait_s=st.sampled_from([0.0, 0.5, 3.0]),
        max_in_flight=st.integers(1, 3),
        service_margin_s=st.sampled_from([0.0, 0.0, 1.0]),
        min_batch_tokens=st.sampled_from([1, 1, 4]),
    )
    def change_limits(self, **limits: Any) -> None:
        self.count()
        self.batcher.limits = self.limits = BatchLimits(max_patience_s=2.0, **limits)
        self.settle()

    @rule(limits=QUEUE_LIMITS)
    def change_queue_limits(self, limits: QueueLimits) -> None:
        self.count()
        self.batcher.queue.limits = limits

    @rule(how=st.integers(0, 9), servers=st.integers(0, 2))
    def stop(self, how: int, servers: int) -> None:
        """Drains, or closes and begins anew; mostly nothing."""
        if how > 1:
            return
        self.count()
        if how == 0:
            self.batcher.drain()
            self.settle()
            return
        self.loop.run_until_complete(self.batcher.close())
        self.settle()
        assert all(call.task is not None and call.task.done() for call in self.calls)
        late = self._submit(1, 0.5, 50.0, "a")
        self.settle()
        assert late.task is not None
        assert isinstance(late.task.exception(), RequestCancelledError)
        assert (len(self.batcher.queue), self.batcher.statistics().in_flight) == (0, 0)
        self.servers = servers
        self.begin()

    @invariant()
    def nothing_is_lost(self) -> None:
        pending = [call for call in self.calls if call.task is not None and not call.task.done()]
        downstream = [value for values, _ in self.running for value in values]
        assert len(downstream) == len(set(downstream))
        assert all(not all(map(self._done, values)) for values, _ in self.running)  # nothing runs for nobody
        waiting = [item.value.value for item, *_ in self._queued()]
        assert sorted(call.value for call in pending) == sorted(
            waiting + [value for value in downstream if not self._done(value)]
        )
        assert self.batcher.queue.tokens == sum(self.calls[value].tokens for value in waiting)
        assert self.batcher.alive
        assert self.batcher.statistics().in_flight == len(self.running)

    def _queued(self) -> list[tuple[QueueItem[Any]]]:
        return [(entry[2],) for entries in self.batcher.queue._groups.values() for entry in entries]

    def _done(self, value: int) -> bool:
        task = self.calls[value].task
        return task is not None and task.done()

    def teardown(self) -> None:
        self.batcher.queue.limits = QueueLimits()
        for _ in range(1000):
            if not self.running and not len(self.batcher.queue):
                break
            for _, gate in self.running:
                gate.set_result(0)
            self.loop.now += 0.01
            self.settle()
        assert (len(self.batcher.queue), self.batcher.queue.tokens) == (0, 0)
        assert self.batcher.statistics().in_flight == 0
        for call in self.calls:
            self.check_outcome(call)
        self.loop.run_until_complete(self.batcher.close())
        self.calls.clear()
        assert asyncio.all_tasks(self.loop) == set()
        gc.collect()
        self.settle()
        self.loop.close()
        assert self.complaints == []

    def check_outcome(self, call: Call) -> None:
        """Exactly one, and the right one."""
        assert call.task is not None
        assert call.task.done()
        assert call.computed <= 1
        if call.task.cancelled():
            assert call.left
        elif (error := call.task.exception()) is None:
            assert call.task.result() == -call.value
            assert call.computed == 1
        else:
            assert isinstance(error, PimoeError)
            assert "secret" not in str(error)
            if isinstance(error, OverloadedError):
                assert call.computed == 0
            elif type(error) in (PimoeError, InvalidTensorError):
                assert call.computed == 1


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(LONG, max_examples=320)
TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(LONG, max_examples=100)


@pytest.mark.parametrize("machine", list(LEAST))
def test_so_many_operations_were_run(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not OPERATIONS[machine]:
        pytest.skip("the machine did not run")
    with capsys.disabled():
        print(f"\n{machine}: {OPERATIONS[machine]:,} operations")
    assert OPERATIONS[machine] >= LEAST[machine]
