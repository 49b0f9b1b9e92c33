"""Sums over replicas: every kind of value a status page has, and replicas that do not agree on what they have."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.deployments.totals import add_up, quantile
from pimoe.runtime.histogram import Histogram


def histogram(*values: float, bounds: tuple[float, ...] = (1.0, 2.0, 5.0)) -> dict[str, Any]:
    counted = Histogram(bounds)
    for value in values:
        counted.add(value)
    return counted.snapshot()


def test_nothing_adds_up_to_nothing() -> None:
    assert add_up([]) == {}
    assert add_up([{}, {}]) == {}


def test_numbers_and_maps_are_summed_and_the_rest_is_left_out() -> None:
    parts = [
        {"a": 1, "b": {"c": 2.5, "name": "x"}, "list": [1, 2], "text": "lru", "open": True},
        {"a": 2, "b": {"c": 0.5, "name": "y"}, "list": [3, 4], "text": "lru", "open": False},
    ]
    assert add_up(parts) == {"a": 3, "b": {"c": 3.0}, "open": 1}


def test_a_key_that_some_lack_is_summed_over_those_that_have_it() -> None:
    assert add_up([{"idle": 3}, {"full": 4}, {"idle": 5}]) == {"idle": 8, "full": 4}
    assert add_up([{"closed": {"idle": 3}}, {"closed": {"full": 4}}, {}]) == {"closed": {"idle": 3, "full": 4}}


def test_what_some_have_none_of_is_summed_over_the_others() -> None:
    """A gateway whose second level is off, or a router without an engine, hides nothing of the rest."""
    assert add_up([{"second": None}, {"second": {"hits": 3}}]) == {"second": {"hits": 3}}
    assert add_up([{"rate": 2.0}, {"rate": None}]) == {"rate": 2.0}
    assert add_up([{"second": None}, {"second": None}]) == {}


def test_values_of_two_kinds_are_left_out() -> None:
    assert add_up([{"a": 1, "b": 1}, {"a": {"x": 1}, "b": 1}]) == {"b": 2}
    assert add_up([{"a": {"x": 1}, "b": 1}, {"a": 1, "b": 1}]) == {"b": 2}


def test_histograms_are_added_bucket_by_bucket() -> None:
    total = add_up([{"waits": histogram(0.5, 3, 9)}, {"waits": histogram(0.5, 1.5)}])
    assert total == {"waits": histogram(0.5, 3, 9, 0.5, 1.5)}


def test_histograms_with_other_bounds_are_left_out() -> None:
    """While replicas of two versions run side by side: no page at all would be worse than one number less."""
    parts = [{"waits": histogram(1), "n": 1}, {"waits": histogram(1, bounds=(1.0, 9.0)), "n": 1}]
    assert add_up(parts) == {"n": 2}


def test_the_parts_stay_as_they_are() -> None:
    parts = [{"waits": histogram(1), "in": {"n": 1}}, {"waits": histogram(2), "in": {"n": 1}}]
    before = repr(parts)
    add_up(parts)
    assert repr(parts) == before


@given(st.lists(st.lists(st.floats(0, 100), max_size=20), min_size=1, max_size=5))
def test_the_sum_of_histograms_is_the_histogram_of_all(replicas: list[list[float]]) -> None:
    total = add_up([{"h": histogram(*values)} for values in replicas])["h"]
    together = histogram(*(value for values in replicas for value in values))
    assert total["counts"] == together["counts"]
    assert total["sum"] == pytest.approx(together["sum"])


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((), 0.5, None),
        ((0.5,), 0.5, 1.0),
        ((0.5,), 0.99, 1.0),
        ((1.0,), 0.5, 1.0),  # bounds are inclusive, as Prometheus has them
        ((0.5, 1.5), 0.5, 1.0),
        ((0.5, 1.5, 1.5), 0.5, 2.0),
        ((0.5, 3.0), 0.99, 5.0),
        ((3.0, 9.0), 0.5, 5.0),
        ((9.0,), 0.5, math.inf),
        ((1.5, 9.0), 0.0, 2.0),
        ((1.5, 9.0), 1.0, math.inf),
    ],
)
def test_quantile(values: tuple[float, ...], share: float, expected: float | None) -> None:
    assert quantile(histogram(*values), share) == expected


@given(st.lists(st.floats(0, 5), min_size=1, max_size=50), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_bounds_that_share_of_the_values(values: list[float], share: float) -> None:
    bound = quantile(histogram(*values), share)
    assert bound is not None
    assert sum(value <= bound for value in values) >= share * len(values)
