"""When a call is sent again: numbers only, no clock."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.clients import Limits, RetryPolicy
from pimoe.clients.retries import RetryBudget, pause_s, retry_after_s

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "3", "retry-after-ms": "1250"}, 1.25),
        ({"retry-after": "3", "retry-after-ms": "soon"}, 3.0),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Sat, 21 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30"}, 30.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, NOW) == expected


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 100))
def test_a_pause_is_never_shorter_than_asked_for_nor_longer_than_the_backoff(
    retries: int, draw: float, asked_s: float | None
) -> None:
    policy = RetryPolicy(base_delay_s=0.1, max_delay_s=5.0)
    pause = pause_s(policy, retries, asked_s, draw)
    assert (asked_s or 0.0) <= pause <= (asked_s or 0.0) + min(5.0, 0.1 * 2.0 ** min(retries, 60))


def test_backoff_doubles() -> None:
    policy = RetryPolicy(base_delay_s=1.0, max_delay_s=4.0)
    assert [pause_s(policy, n, None, 0.5) for n in range(5)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_budget_is_a_share_of_the_calls() -> None:
    budget = RetryBudget(RetryPolicy(budget_ratio=0.25, budget_per_s=0.0, budget_burst=2.0), now=0.0)
    assert [budget.withdraw(0.0) for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.deposit()
    assert [budget.withdraw(0.0) for _ in range(2)] == [True, False]


def test_budget_refills_with_time_and_is_bounded() -> None:
    budget = RetryBudget(RetryPolicy(budget_ratio=0.0, budget_per_s=1.0, budget_burst=2.0), now=10.0)
    assert [budget.withdraw(10.0) for _ in range(3)] == [True, True, False]
    assert [budget.withdraw(11.0) for _ in range(2)] == [True, False]
    assert [budget.withdraw(1000.0) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RetryPolicy(max_retries=-1), "RetryPolicy.max_retries"),
        (lambda: RetryPolicy(max_delay_s=float("nan")), "RetryPolicy.max_delay_s"),
        (lambda: Limits(max_connections=0), "Limits.max_connections"),
        (lambda: Limits(idle_timeout_s=float("inf")), "Limits.idle_timeout_s"),
    ],
)
def test_wrong_settings_are_named(make: object, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()  # type: ignore[operator]
    assert Limits(grace_s=0).grace_s == 0
