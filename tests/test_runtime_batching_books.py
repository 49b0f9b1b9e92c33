"""The books of a queue: sums, classes and waits."""

from __future__ import annotations

import json
import math

from pimoe.runtime.batching import CLASS_NAMES, PriorityQueue, QueueItem, QueueLimits, QueueStatistics
from pimoe.runtime.batching.books import ClassBooks
from pimoe.runtime.errors import PimoeError


def push(
    queue: PriorityQueue[str], tokens: int, priority: float, arrival: float = 0.0, deadline: float = math.inf
) -> QueueItem[str]:
    def ignore(error: PimoeError) -> None:
        """Whoever waits is told elsewhere."""

    item = QueueItem("", tokens, priority, arrival, deadline, arrival, ignore)
    queue.push(item)
    return item


def test_sums_are_over_all_classes() -> None:
    books = [ClassBooks() for _ in CLASS_NAMES]
    for n, each in enumerate(books, 1):
        each.came(10 * n)
        each.came(1)
        each.went(1)
        each.refused, each.shed, each.expired, each.cancelled = n, 2 * n, 3 * n, 4 * n
    statistics = QueueStatistics.of(books, None)
    assert statistics[:6] == (5, 150, 15, 30, 45, 60)
    assert statistics.tokens_per_s == 0.0
    assert list(statistics.classes) == list(CLASS_NAMES)
    assert statistics.classes["low"]["tokens"] == 20


def test_what_becomes_of_an_item_is_in_its_class() -> None:
    queue: PriorityQueue[str] = PriorityQueue(QueueLimits(max_tokens=100))
    cancelled = push(queue, 5, 0.5)
    push(queue, 7, 1.0, deadline=1.0)
    shed = push(queue, 11, 0.0)
    served = push(queue, 13, 0.7, arrival=2.0)
    queue.cancel(cancelled)
    queue.expire(1.0)
    queue.shed(shed)
    queue.take([served], now=2.3)
    classes = queue.statistics().classes
    for name, fate in {"batch": "shed", "default": "cancelled", "interactive": "expired"}.items():
        counts = {key: value for key, value in classes[name].items() if key != "waits"}
        assert counts == dict.fromkeys(counts, 0) | {fate: 1}
    assert classes["high"]["waits"]["sum"] == 2.3 - 2.0
    assert sum(classes["high"]["waits"]["counts"]) == 1
    assert queue.statistics()[:6] == (0, 0, 0, 1, 1, 1)


def test_only_what_was_dispatched_at_a_known_time_has_waited() -> None:
    queue: PriorityQueue[str] = PriorityQueue(QueueLimits())
    push(queue, 1, 0.5)
    queue.pop()
    waits = queue.statistics().classes["default"]["waits"]
    assert sum(waits["counts"]) == 0
    assert queue.statistics().tokens_per_s == 0.0


def test_the_books_are_plain() -> None:
    queue: PriorityQueue[str] = PriorityQueue(QueueLimits())
    for at in (1.0, 2.0):
        push(queue, 10, 0.5)
        push(queue, 10, 0.5)
        queue.pop(at)
    plain = json.loads(json.dumps(queue.statistics()._asdict()))
    assert plain["tokens_per_s"] == 10.0
    assert plain["classes"]["default"]["tokens"] == 20
