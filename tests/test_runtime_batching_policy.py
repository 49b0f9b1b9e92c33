"""When a batch closes: pure decisions, tested with numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.batching import BatchLimits, CloseReason, Decision, decide, patience_s
from pimoe.runtime.batching.policy import QueueView, virtual_deadline
from pimoe.runtime.errors import ConfigurationError

LIMITS = BatchLimits(
    max_batch_tokens=100, max_wait_s=0.5, max_in_flight=2, max_patience_s=4.0, service_margin_s=0.25
)
VIEW = QueueView(tokens=40, next_does_not_fit=False, oldest_arrival=10.0, latest_start=20.0)


def test_idle_dispatches_at_once() -> None:
    assert decide(VIEW, 10.0, 0, LIMITS) == Decision(CloseReason.IDLE)


def test_busy_accumulates_until_the_longest_wait_since_arrival() -> None:
    assert decide(VIEW, 10.0, 1, LIMITS) == Decision(None, 10.5)
    assert decide(VIEW, 10.4, 1, LIMITS) == Decision(None, 10.5)
    assert decide(VIEW, 10.5, 1, LIMITS) == Decision(CloseReason.MAX_WAIT)


def test_used_up_slack_closes_before_the_longest_wait() -> None:
    urgent = replace(VIEW, latest_start=10.2)
    assert decide(urgent, 10.1, 1, LIMITS) == Decision(None, 10.2)
    assert decide(urgent, 10.2, 1, LIMITS) == Decision(CloseReason.SLACK)


@pytest.mark.parametrize("in_flight", [0, 1])
def test_full_batches_do_not_wait(in_flight: int) -> None:
    assert decide(replace(VIEW, tokens=100), 10.0, in_flight, LIMITS) == Decision(CloseReason.FULL)
    assert decide(replace(VIEW, tokens=250), 10.0, in_flight, LIMITS) == Decision(CloseReason.FULL)
    left_behind = replace(VIEW, next_does_not_fit=True)
    assert decide(left_behind, 10.0, in_flight, LIMITS) == Decision(CloseReason.NEXT_DOES_NOT_FIT)


def test_draining_does_not_wait() -> None:
    assert decide(VIEW, 10.0, 1, LIMITS, draining=True) == Decision(CloseReason.DRAIN)


@pytest.mark.parametrize("in_flight", [2, 3])
@pytest.mark.parametrize("view", [VIEW, replace(VIEW, tokens=100), replace(VIEW, next_does_not_fit=True)])
def test_without_a_credit_nothing_closes(in_flight: int, view: QueueView) -> None:
    for draining in (False, True):
        assert decide(view, 1000.0, in_flight, LIMITS, draining) == Decision(None, math.inf)


moments = st.floats(0, 1e6)


@given(st.integers(1, 200), st.booleans(), moments, moments, moments, st.integers(0, 3), st.booleans())
def test_a_decision_either_closes_or_looks_again_later(
    tokens: int, left: bool, arrival: float, start: float, now: float, in_flight: int, draining: bool
) -> None:
    decision = decide(QueueView(tokens, left, arrival, start), now, in_flight, LIMITS, draining)
    assert decision.reason is not None or decision.wake_at > now
    if in_flight < LIMITS.max_in_flight and now >= arrival + LIMITS.max_wait_s:
        assert decision.reason is not None  # an upper bound


def test_patience_falls_with_priority() -> None:
    assert [patience_s(priority, 4.0) for priority in (0.0, 0.25, 0.5, 1.0)] == [4.0, 3.0, 2.0, 0.0]


def test_virtual_deadlines() -> None:
    assert virtual_deadline(10.0, 1000.0, 1.0, LIMITS) == 10.0
    assert virtual_deadline(10.0, 1000.0, 0.0, LIMITS) == 14.0
    assert virtual_deadline(10.0, 12.0, 0.0, LIMITS) == 11.75  # its own deadline, less the margin, comes first
    assert virtual_deadline(10.0, 12.0, 0.0, LIMITS, service_s=1.0) == 10.75


@given(moments, moments, st.floats(0, 1), st.floats(0, 1))
def test_only_what_arrives_within_the_difference_of_patiences_overtakes(
    first: float, second: float, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    difference = patience_s(low, 4.0) - patience_s(high, 4.0)
    if second > first + difference + 1e-6:
        assert virtual_deadline(second, math.inf, high, LIMITS) > virtual_deadline(first, math.inf, low, LIMITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_tokens", 0),
        ("max_in_flight", 0),
        ("max_wait_s", -0.1),
        ("max_wait_s", math.inf),
        ("max_patience_s", math.nan),
        ("service_margin_s", -1.0),
    ],
)
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"batching.{name} is ") as raised:
        BatchLimits(**{name: value})  # type: ignore[arg-type]
    assert raised.value.param == name
