"""Autoscaling by measured load. Serve's own policies count requests on its handles, where pimoe sends none."""

from __future__ import annotations

import math
import time
from typing import Any

LOAD = "load"


class LoadMeter:
    """Turns a counter of busy seconds into a load: busy seconds per second since the last reading.

    Args:
        busy_s: the counter's value now.
    """

    def __init__(self, busy_s: float = 0.0, now: float | None = None) -> None:
        self._busy_s = busy_s
        self._read_at = time.monotonic() if now is None else now

    def read(self, busy_s: float, now: float | None = None) -> dict[str, float]:
        """What `record_autoscaling_stats` returns: `{"load": 0 to 1}`."""
        now = time.monotonic() if now is None else now
        elapsed_s = max(now - self._read_at, 1e-3)
        load = min(1.0, max(0.0, busy_s - self._busy_s) / elapsed_s)
        self._busy_s, self._read_at = busy_s, now
        return {LOAD: load}


class ByLoad:
    """Serve autoscaling policy: as many replicas as bring the mean load down to `target`.

    In a Serve config: `autoscaling_config: {min_replicas: 1, max_replicas: 4, policy: {policy_function:
    "pimoe.deployments.autoscaling:ByLoad", policy_kwargs: {target: 0.6}}}`; in the application's `args` it is the
    default of every `autoscaling` section.
    """

    def __init__(self, target: float = 0.7) -> None:
        self.target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted; `context` is Serve's `AutoscalingContext`."""
        loads = (context.aggregated_metrics or {}).get(LOAD) or {}
        wanted = replicas_for(list(loads.values()), context.current_num_replicas, self.target)
        bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(bounds[0], min(bounds[1], wanted)), {}


def replicas_for(loads: list[float], current: int, target: float) -> int:
    """Replicas that bring `loads` (one of 0 to 1 per replica) to a mean of `target`; `current` without loads."""
    return math.ceil(sum(loads) / target - 1e-9) if loads else current


def with_default_policy(autoscaling: dict[str, Any]) -> dict[str, Any]:
    """The `autoscaling_config` with our policy, unless it names one."""
    ours = {"policy": {"policy_function": "pimoe.deployments.autoscaling:ByLoad"}}
    return {**ours, **autoscaling}
