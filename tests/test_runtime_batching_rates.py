"""Rates: of what comes, and of what leaves a queue that is never empty."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.batching.rates import DecayingRate, DrainRate


def test_nothing_counted_is_no_rate() -> None:
    rate = DecayingRate()
    assert (rate.per_s(5.0), rate.age_s(5.0)) == (0.0, 0.0)
    assert DrainRate().tokens_per_s is None


def test_an_old_meter_tells_the_rate() -> None:
    rate = DecayingRate(5.0)
    for n in range(1000):
        rate.add(2.0, n / 10)
    assert rate.per_s(100.0) == pytest.approx(20.0, rel=0.02)
    assert rate.age_s(100.0) == 100.0


def test_a_young_meter_divides_by_what_it_saw() -> None:
    rate = DecayingRate(5.0)
    for n in range(10):
        rate.add(1.0, 100.0 + n / 100)
    assert rate.per_s(100.1) == pytest.approx(100.0, rel=0.02)  # a tenth of a second of five


def test_what_is_old_counts_for_less() -> None:
    rate = DecayingRate(5.0)
    for n in range(1000):
        rate.add(1.0, n / 10)
    assert rate.per_s(105.0) == pytest.approx(10.0 / math.e, rel=0.02)
    for n in range(1000):
        rate.add(1.0, 105.0 + n)
    assert rate.per_s(1105.0) == pytest.approx(1.0, rel=0.2)  # and at last for nothing


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-10.0, 1e4)), min_size=1, max_size=50))
def test_a_clock_that_stands_or_steps_back_breaks_nothing(steps: list[tuple[float, float]]) -> None:
    decaying, drain, now = DecayingRate(), DrainRate(), 1000.0
    for amount, step in steps:
        now += step
        decaying.add(amount, now)
        drain.left(int(amount), True, now)
        for at in (now, now - 5.0, now + 5.0, now + 1e9):
            assert math.isfinite(decaying.per_s(at))
            assert decaying.per_s(at) >= 0.0
            assert decaying.age_s(at) >= 0.0
        assert drain.tokens_per_s is None or (drain.tokens_per_s > 0 and not math.isnan(drain.tokens_per_s))


def test_a_standing_clock_gives_a_finite_rate() -> None:
    rate, drain = DecayingRate(), DrainRate()
    for _ in range(1000):
        rate.add(1.0, 7.0)
        drain.left(10, True, 7.0)
    assert math.isfinite(rate.per_s(7.0))
    assert drain.tokens_per_s is None  # no time has passed: there is no telling


def test_a_backlog_is_worked_off_at_so_many_tokens_per_second() -> None:
    drain = DrainRate()
    for n in range(100):
        drain.left(50, True, n * 0.25)
    assert drain.tokens_per_s == pytest.approx(200.0)


def test_the_last_of_a_backlog_counts() -> None:
    drain = DrainRate()
    drain.left(50, True, 0.0)
    drain.left(50, False, 0.5)
    assert drain.tokens_per_s == pytest.approx(100.0)


def test_what_is_served_at_once_says_nothing() -> None:
    drain = DrainRate()
    for n in range(100):
        drain.left(50, False, float(n))
    assert drain.tokens_per_s is None


def test_time_without_a_backlog_does_not_count() -> None:
    drain = DrainRate()
    for burst in range(20):
        start = burst * 100.0
        for n in range(5):
            drain.left(10, n < 4, start + n)  # ten a second while something waits, then a long rest
    assert drain.tokens_per_s == pytest.approx(10.0)
    drain.left(10, True, 5000.0)
    drain.emptied()  # all that waited was cancelled
    drain.left(10, True, 6000.0)
    assert drain.tokens_per_s == pytest.approx(10.0)


def test_the_rate_follows_a_change() -> None:
    drain = DrainRate(5.0)
    now = 0.0
    for step, tokens in ((100, 10), (100, 1000)):
        for _ in range(step):
            now += 1.0
            drain.left(tokens, True, now)
    assert drain.tokens_per_s == pytest.approx(1000.0, rel=0.01)
