"""Autoscaling by measured load: the meter and the policy, with numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pimoe.deployments.autoscaling import ByLoad, LoadMeter, replicas_for, with_default_policy


def test_load_is_busy_time_over_time_since_the_last_reading() -> None:
    meter = LoadMeter(busy_s=10.0, now=100.0)
    assert meter.read(11.0, now=104.0) == {"load": 0.25}
    assert meter.read(11.0, now=105.0) == {"load": 0.0}
    assert meter.read(99.0, now=106.0) == {"load": 1.0}


@pytest.mark.parametrize(
    ("loads", "current", "wanted"),
    [([0.7], 1, 1), ([0.8], 1, 2), ([0.9, 0.9], 2, 3), ([0.1, 0.1, 0.1], 3, 1), ([], 4, 4), ([0.0], 1, 0)],
)
def test_as_many_replicas_as_bring_the_mean_to_the_target(loads: list[float], current: int, wanted: int) -> None:
    assert replicas_for(loads, current, target=0.7) == wanted


def test_the_policy_keeps_to_the_bounds() -> None:
    def context(loads: dict[str, float]) -> SimpleNamespace:
        return SimpleNamespace(
            aggregated_metrics={"load": loads},
            current_num_replicas=len(loads),
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=2,
        )

    policy = ByLoad(target=0.5)
    assert policy(context({"a": 1.0, "b": 1.0}))[0] == 2
    assert policy(context({"a": 0.0}))[0] == 1


def test_a_policy_of_the_users_own_is_kept() -> None:
    assert (
        with_default_policy({"policy": {"policy_function": "my:policy"}})["policy"]["policy_function"]
        == "my:policy"
    )
    assert "ByLoad" in with_default_policy({"max_replicas": 3})["policy"]["policy_function"]
