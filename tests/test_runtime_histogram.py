"""Histograms: every value is in one bucket."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.histogram import SECONDS, TOKENS, Histogram


@pytest.mark.parametrize("bounds", [SECONDS, TOKENS])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


def test_a_bound_belongs_to_the_bucket_below() -> None:
    histogram = Histogram((1, 10))
    for value in (0, 1, 1.5, 10, 10.5, 1e9):
        histogram.add(value)
    assert histogram.snapshot() == {"bounds": [1, 10], "counts": [2, 2, 2], "sum": 1e9 + 23}


@given(st.lists(st.floats(-10, 100)))
def test_nothing_is_lost_or_doubled(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    counts = histogram.snapshot()["counts"]
    assert sum(counts) == len(values)
    assert histogram.total == pytest.approx(sum(values))
    for bound, below in zip(SECONDS, (sum(counts[: n + 1]) for n in range(len(SECONDS))), strict=True):
        assert below == sum(value <= bound for value in values)


def test_what_is_beyond_every_bound_is_counted() -> None:
    histogram = Histogram()
    histogram.add(math.inf)
    assert histogram.counts[-1] == 1


def test_a_snapshot_is_a_copy() -> None:
    histogram = Histogram((1,))
    snapshot = histogram.snapshot()
    histogram.add(0.5)
    assert snapshot == {"bounds": [1], "counts": [0, 0], "sum": 0.0}
