"""Priorities and their five classes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.batching import CLASS_NAMES, NAMED_PRIORITIES, SERVICE_TIERS, class_of
from pimoe.runtime.batching.classes import CLASSES


@pytest.mark.parametrize(
    ("priority", "name"),
    [
        (0.0, "batch"),
        (math.nextafter(0.2, 0.0), "batch"),
        (0.2, "low"),
        (math.nextafter(0.4, 0.0), "low"),
        (0.4, "default"),
        (0.5, "default"),
        (math.nextafter(0.6, 0.0), "default"),
        (0.6, "high"),
        (0.8, "interactive"),
        (math.nextafter(1.0, 0.0), "interactive"),
        (1.0, "interactive"),
    ],
)
def test_the_boundaries_belong_to_the_class_above(priority: float, name: str) -> None:
    assert CLASS_NAMES[class_of(priority)] == name


@pytest.mark.parametrize(("priority", "name"), [(-0.1, "batch"), (-1e9, "batch"), (1.1, "interactive")])
def test_what_is_out_of_range_is_in_the_outermost_class(priority: float, name: str) -> None:
    assert CLASS_NAMES[class_of(priority)] == name


@given(st.floats(0, 1), st.floats(0, 1))
def test_classes_rise_with_priorities(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert class_of(low) <= class_of(high)
    assert class_of(low) in CLASSES


@pytest.mark.parametrize("names", [NAMED_PRIORITIES, SERVICE_TIERS])
def test_named_priorities_are_priorities(names: dict[str, float]) -> None:
    assert all(0.0 <= priority <= 1.0 for priority in names.values())


def test_a_named_priority_is_in_the_class_of_its_name() -> None:
    for name, priority in NAMED_PRIORITIES.items():
        assert CLASS_NAMES[class_of(priority)] == name
    assert CLASS_NAMES[class_of(SERVICE_TIERS["flex"])] == "batch"
    assert "auto" not in SERVICE_TIERS
