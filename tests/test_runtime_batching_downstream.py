"""What is known of downstream: when it is free, how busy it is, how large its batches may be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from pimoe.runtime.batching import BatchLimits
from pimoe.runtime.batching.downstream import Downstream, Flight

LIMITS = BatchLimits(max_batch_tokens=1600)


def fly(downstream: Downstream, tokens: int, start: float, seconds: float, spare_s: float = math.inf) -> None:
    """One batch from its dispatch to its end."""
    flight = downstream.dispatched(tokens, spare_s, start)
    downstream.computed(flight, tokens, tokens, start + seconds)
    downstream.ended(flight, start + seconds)


def taught(servers: Callable[[], int] | None = None, seconds_per_token: float = 0.01) -> tuple[Downstream, float]:
    """One that predicts, and the time it is."""
    downstream, now = Downstream(1600, servers), 0.0
    for n in range(40):
        tokens = 100 * (1 + n % 8)
        fly(downstream, tokens, now, tokens * seconds_per_token)
        now += tokens * seconds_per_token
    assert downstream.latency.trusted
    return downstream, now


def test_before_anything_it_is_free() -> None:
    downstream = Downstream(1600)
    assert downstream.free_at(5.0) == 5.0
    assert downstream.utilisation(5.0) == 0.0
    assert downstream.fixed_share(100) == 1.0
    assert downstream.max_tokens(LIMITS) == 1600


def test_batches_are_worked_off_one_after_the_other() -> None:
    downstream, now = taught()
    first = downstream.dispatched(100, math.inf, now)
    assert downstream.free_at(now) == pytest.approx(now + 1.0, rel=0.01)
    second = downstream.dispatched(200, math.inf, now)
    assert downstream.free_at(now) == pytest.approx(now + 3.0, rel=0.01)
    downstream.ended(first, now + 0.5)
    assert downstream.free_at(now + 0.5) == pytest.approx(now + 2.5, rel=0.01)
    assert downstream.free_at(now + 50.0) == now + 50.0  # never in the past
    downstream.ended(second, now + 60.0)
    assert downstream.free_at(now + 60.0) == now + 60.0


def test_a_batch_is_bound_no_sooner_than_downstream_needs_it() -> None:
    downstream, now = taught(lambda: 1)
    assert downstream.hold_until(now) <= now  # nothing is in flight
    first = downstream.dispatched(100, math.inf, now)
    assert now + 0.9 < downstream.hold_until(now) <= now + 1.0 - 0.005
    second = downstream.dispatched(200, math.inf, now)
    assert now + 2.9 < downstream.hold_until(now) < now + 3.0
    for flight in (second, first):
        downstream.ended(flight, now + 0.1)
    assert downstream.hold_until(now + 0.1) <= now + 0.1
    unknown = Downstream(1600, lambda: 1)
    unknown.dispatched(100, math.inf, 5.0)
    assert unknown.hold_until(5.0) == 5.0


def test_where_nobody_knows_how_many_are_computed_at_once_nothing_is_held() -> None:
    downstream, now = taught(None)
    for flights in range(5):
        assert downstream.hold_until(now + flights) == now + flights
        downstream.dispatched(100, math.inf, now)


def test_of_two_servers_a_batch_waits_for_the_first_that_is_free() -> None:
    downstream, now = taught(lambda: 2)
    first = downstream.dispatched(100, math.inf, now)
    assert downstream.hold_until(now) <= downstream.free_at(now) == now
    second = downstream.dispatched(200, math.inf, now + 0.1)
    assert downstream.free_at(now + 0.2) == pytest.approx(now + 1.0, rel=1e-3)
    assert downstream.hold_until(now + 0.2) == downstream.free_at(now + 0.2) - downstream.spare_s
    downstream.ended(first, now + 0.9)
    assert downstream.hold_until(now + 0.9) <= now + 0.9
    downstream.ended(second, now + 2.0)
    assert downstream.free_at(now + 2.0) == now + 2.0


def test_the_number_of_servers_may_change_and_is_at_least_one() -> None:
    servers = [3]
    downstream, now = taught(lambda: servers[0])
    for _ in range(2):
        downstream.dispatched(100, math.inf, now)
    assert downstream.hold_until(now) <= now
    free = []
    for servers[0] in (2, 1, 0):
        free.append(downstream.free_at(now))
    assert free == pytest.approx([now + 1.0, now + 2.0, now + 2.0], rel=1e-3)


def test_waiting_for_another_batch_is_not_a_batchs_own_time() -> None:
    downstream = Downstream(1600)
    first, second = (downstream.dispatched(100, math.inf, 10.0) for _ in range(2))
    for flight, end in ((first, 11.0), (second, 12.0)):
        downstream.computed(flight, 100, 100, end)
        downstream.ended(flight, end)
    assert downstream.latency.mean_s == 1.0


def test_busy_is_what_has_anything_in_flight() -> None:
    downstream = Downstream(1600)
    for second in range(60):
        flights = [downstream.dispatched(1, math.inf, float(second)) for _ in range(2)]
        for flight in flights:
            downstream.ended(flight, second + 0.25)
    assert downstream.utilisation(60.0) == pytest.approx(0.25, rel=0.2)
    downstream.dispatched(1, math.inf, 60.0)
    assert downstream.utilisation(160.0) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("clock", [0.0, 5.0])
def test_a_standing_clock_breaks_nothing(clock: float) -> None:
    downstream = Downstream(1600)
    for _ in range(100):
        fly(downstream, 10, clock, 0.0, spare_s=0.0)
        assert 0.0 <= downstream.utilisation(clock) <= 1.0
        assert math.isfinite(downstream.free_at(clock))
        assert 0.0 <= downstream.fixed_share(10) <= 1.0
        assert 1 <= downstream.max_tokens(LIMITS) <= 1600


def test_batches_that_take_more_than_half_of_what_can_be_spared_get_smaller() -> None:
    downstream = Downstream(1600)
    fly(downstream, 100, 0.0, 5.1, spare_s=10.0)
    assert downstream.max_tokens(LIMITS) == 800
    fly(downstream, 100, 10.0, 5.0, spare_s=10.0)
    assert downstream.max_tokens(LIMITS) == 900


def test_where_batches_can_be_predicted_the_users_bound_holds() -> None:
    downstream, now = taught()
    fly(downstream, 100, now, 1.0, spare_s=0.1)
    assert downstream.max_tokens(LIMITS) == 1600


@pytest.mark.parametrize(("seconds", "learnt"), [(0.5, False), (4.9, False), (5.1, True)])
def test_of_a_batch_that_all_have_left_only_its_length_is_learnt(seconds: float, learnt: bool) -> None:
    downstream = Downstream(1600)
    flight = downstream.dispatched(100, 10.0, 0.0)
    downstream.abandoned(flight, seconds)
    downstream.ended(flight, seconds)
    assert downstream.latency.samples == learnt
    assert downstream.max_tokens(LIMITS) == (800 if learnt else 1600)


def test_the_fixed_share_is_of_a_batch_of_that_size() -> None:
    downstream, now = Downstream(1600), 0.0
    for n in range(60):
        tokens = 100 * (1 + n % 8)
        fly(downstream, tokens, now, 1.0 + tokens * 0.01)
        now += 10.0
    assert downstream.fixed_share(100) == pytest.approx(0.5, rel=0.05)
    assert downstream.fixed_share(800) == pytest.approx(1 / 9, rel=0.05)
    assert downstream.fixed_share(900) == downstream.fixed_share(800)  # larger ones were not seen


def test_flights_of_one_size_are_told_apart() -> None:
    downstream = Downstream(1600)
    one, other = (downstream.dispatched(100, 1.0, 0.0) for _ in range(2))
    assert isinstance(one, Flight)
    downstream.ended(other, 1.0)
    downstream.ended(one, 2.0)
    with pytest.raises(ValueError, match="not in list"):
        downstream.ended(one, 2.0)
