"""The bounds of a queue: what they accept, and what they say of a class."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pimoe.runtime.batching import QueueLimits
from pimoe.runtime.errors import ConfigurationError

EVEN = (1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_items", 0),
        ("retry_after_s", 0.0),
        ("retry_after_s", math.nan),
        ("target_delay_s", -0.1),
        ("target_delay_s", math.inf),
        ("target_delay_s", math.nan),
        ("standing_s", -1.0),
        ("standing_s", math.inf),
        ("min_share", -0.01),
        ("min_share", math.nan),
        ("min_share", 0.21),
        ("class_shares", (1.0, 1.0, 1.0, 1.0)),
        ("class_shares", (*EVEN, 1.0)),
        ("class_shares", (0.0, 1.0, 1.0, 1.0, 1.0)),
        ("class_shares", (1.0, 1.0, 1.1, 1.0, 1.0)),
        ("class_shares", (1.0, math.nan, 1.0, 1.0, 1.0)),
        ("order", "lifo"),
    ],
)
def test_limits_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"queue.{name} is ") as raised:
        QueueLimits(**{name: value})
    assert raised.value.param == name
    assert repr(value).strip("'") in str(raised.value)


@pytest.mark.parametrize(
    "limits", [{"min_share": 0.2}, {"min_share": 0.0}, {"target_delay_s": 0.0}, {"standing_s": 0.0}]
)
def test_the_ends_of_the_ranges_are_allowed(limits: dict[str, float]) -> None:
    assert QueueLimits(**limits).prioritised  # type: ignore[arg-type]


def test_a_class_has_room_up_to_its_shares() -> None:
    limits = QueueLimits(max_tokens=100, max_items=10, class_shares=(0.5, 0.6, 0.8, 0.9, 1.0))
    assert limits.class_has_room(0, 1, 30, 20)
    assert not limits.class_has_room(0, 1, 30, 21)
    assert limits.class_has_room(1, 1, 30, 30)
    assert limits.class_has_room(0, 4, 4, 1)
    assert not limits.class_has_room(0, 5, 5, 1)
    assert limits.class_has_room(4, 9, 9, 91)
    assert not limits.class_has_room(4, 10, 10, 1)


def test_one_of_each_class_may_always_be_there() -> None:
    limits = QueueLimits(max_tokens=1, max_items=1, class_shares=(0.1, 0.1, 0.1, 0.1, 0.1))
    assert all(limits.class_has_room(rank, 0, 0, 1000) for rank in range(5))
    assert not any(limits.class_has_room(rank, 1, 1, 1) for rank in range(5))


def test_one_queue_in_order_of_arrival_knows_no_classes() -> None:
    limits = QueueLimits(max_tokens=1, max_items=1, class_shares=(0.1, 0.1, 0.1, 0.1, 0.1), order="fifo")
    assert not limits.prioritised
    assert limits.class_has_room(0, 1000, 1000, 1000)
