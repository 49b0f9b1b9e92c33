"""When a batch closes: pure decisions, tested with numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.batching import BatchLimits, CloseReason, Decision, QueueLimits, decide, patience_s
from pimoe.runtime.batching.policy import (
    Load,
    QueueView,
    lingering_pays,
    overtaking_bound_s,
    sort_key,
    virtual_deadline,
)
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


BUSY = Load(arrivals_per_s=100.0, utilisation=0.9, fixed_share=0.5)
CALM = [
    replace(BUSY, arrivals_per_s=1.9),
    replace(BUSY, utilisation=0.4),
    replace(BUSY, fixed_share=0.01),
    Load(0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("load", CALM)
def test_lingering_is_for_company_that_comes_saves_something_and_is_needed(load: Load) -> None:
    assert lingering_pays(BUSY, 0.5)
    assert not lingering_pays(load, 0.5)


def test_lingering_pays_at_the_very_bounds() -> None:
    assert lingering_pays(Load(2.0, 0.5, 0.05), 0.5)
    assert not lingering_pays(BUSY, 0.0)
    assert lingering_pays(Load(100.0, 0.9), 0.5)  # what is saved is not known: it may be all


@pytest.mark.parametrize("load", CALM)
def test_nobody_lingers_for_nothing(load: Load) -> None:
    assert decide(VIEW, 10.0, 1, LIMITS, load=BUSY) == Decision(None, 10.5)
    assert decide(VIEW, 10.0, 1, LIMITS, load=load) == Decision(CloseReason.IDLE)


def test_lingering_ends_when_what_is_left_of_the_window_is_too_short() -> None:
    load = replace(BUSY, arrivals_per_s=4.0)
    assert decide(VIEW, 10.25, 1, LIMITS, load=load) == Decision(None, 10.5)
    assert decide(VIEW, 10.26, 1, LIMITS, load=load) == Decision(CloseReason.IDLE)


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("load", [None, BUSY, CALM[0]])
def test_small_batches_wait_for_company_even_when_downstream_is_idle(in_flight: int, load: Load | None) -> None:
    limits = replace(LIMITS, min_batch_tokens=41)
    assert decide(VIEW, 10.0, in_flight, limits, load=load) == Decision(None, 10.5)
    assert decide(VIEW, 10.5, in_flight, limits, load=load) == Decision(CloseReason.MAX_WAIT)
    assert decide(replace(VIEW, latest_start=10.0), 10.0, in_flight, limits, load=load) == Decision(
        CloseReason.SLACK
    )
    assert decide(VIEW, 10.0, in_flight, limits, True, load) == Decision(CloseReason.DRAIN)
    assert decide(replace(VIEW, tokens=41), 10.0, 0, limits, load=load) == Decision(CloseReason.IDLE)


moments = st.floats(0, 1e6)
loads = st.none() | st.builds(Load, st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 1))


@given(st.integers(1, 200), st.booleans(), moments, moments, moments, st.integers(0, 3), st.booleans(), loads)
def test_a_decision_either_closes_or_looks_again_later(
    tokens: int,
    left: bool,
    arrival: float,
    start: float,
    now: float,
    in_flight: int,
    draining: bool,
    load: Load | None,
) -> None:
    decision = decide(QueueView(tokens, left, arrival, start), now, in_flight, LIMITS, draining, load)
    assert decision.reason is not None or decision.wake_at > now
    if in_flight < LIMITS.max_in_flight and now >= arrival + LIMITS.max_wait_s:
        assert decision.reason is not None  # an upper bound


def test_patience_falls_with_priority() -> None:
    assert [patience_s(priority, 4.0) for priority in (0.0, 0.25, 0.5, 1.0)] == [4.0, 3.0, 2.0, 0.0]


def test_who_has_little_time_is_not_patient() -> None:
    assert [patience_s(0.0, 4.0, timeout_s) for timeout_s in (1.0, 10.0, 40.0, 1e6)] == [0.1, 1.0, 4.0, 4.0]
    assert patience_s(1.0, 4.0, 10.0) == 0.0


def test_virtual_deadlines() -> None:
    assert virtual_deadline(10.0, 1000.0, 1.0, LIMITS) == 10.0
    assert virtual_deadline(10.0, 1000.0, 0.0, LIMITS) == 14.0
    assert virtual_deadline(10.0, 12.0, 0.0, LIMITS) == pytest.approx(10.2)  # a tenth of its time
    # Its own deadline, less the margin and the service, comes first, and is not before its arrival.
    assert virtual_deadline(10.0, 12.0, 0.0, LIMITS, service_s=1.65) == pytest.approx(10.1)
    assert virtual_deadline(10.0, 12.0, 0.0, LIMITS, service_s=5.0) == 10.0


@given(moments, moments, st.floats(0, 1), st.floats(0, 1))
def test_only_what_arrives_within_the_difference_of_patiences_overtakes(
    first: float, second: float, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    difference = patience_s(low, 4.0) - patience_s(high, 4.0)
    if second > first + difference + 1e-6:
        assert virtual_deadline(second, math.inf, high, LIMITS) > virtual_deadline(first, math.inf, low, LIMITS)


@given(moments, st.floats(0, 1e3), st.floats(0, 1), st.floats(0, 1e3))
def test_no_virtual_deadline_lies_before_the_arrival_or_beyond_the_patience(
    arrival: float, timeout_s: float, priority: float, service_s: float
) -> None:
    key = virtual_deadline(arrival, arrival + timeout_s, priority, LIMITS, service_s)
    assert arrival <= key <= arrival + patience_s(priority, LIMITS.max_patience_s)


def test_without_priorities_it_is_the_order_of_arrival() -> None:
    for priority in (0.0, 1.0):
        assert sort_key(QueueLimits(order="fifo"), LIMITS, 10.0, 10.5, priority, 3.0) == 10.0
    assert sort_key(QueueLimits(), LIMITS, 10.0, 1000.0, 0.5, 3.0) == 12.0


def test_the_bound_on_overtaking_is_patience_and_target() -> None:
    assert [overtaking_bound_s(priority, LIMITS, 2.0) for priority in (0.0, 0.5, 1.0)] == [6.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_tokens", 0),
        ("max_batch_tokens", -4096),
        ("min_batch_tokens", 0),
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


def test_the_least_batch_is_no_larger_than_the_largest() -> None:
    assert BatchLimits(max_batch_tokens=10, min_batch_tokens=10).min_batch_tokens == 10
    with pytest.raises(ConfigurationError, match=r"batching.max_batch_tokens is 9; must be at least 10"):
        BatchLimits(max_batch_tokens=9, min_batch_tokens=10)
