"""Settings for one machine that need no thought: replicas share what the machine has."""

from __future__ import annotations

import math
import os
from typing import Any

from .settings import AppSettings


def local_settings(
    model: str | None = None,
    groups: int = 2,
    replicas: int = 1,
    overrides: dict[str, Any] | None = None,
    gpus: int | None = None,
) -> AppSettings:
    """The application on this machine.

    Args:
        model: a checkpoint's folder; None: the embedded model.
        groups, replicas: expert groups, and replicas of each.
        overrides: top-level fields of `AppSettings`, for example from a file; they win.
        gpus: how many to share; None: as many as torch sees.

    Raises:
        pydantic.ValidationError: a field is unknown or has the wrong type.
    """
    overrides = overrides or {}
    given = overrides.get("groups")
    if isinstance(given, list):
        groups = len(given)
    workers = groups * replicas + 1  # the groups' replicas and the router compute; the gateway does not
    cpus = os.cpu_count() or 1
    share = min(1.0, math.floor(100 * cpus / (workers + 1)) / 100)
    gpu_share = _gpu_share(_count_gpus() if gpus is None else gpus, workers)
    worker = {"num_cpus": share, "num_gpus": gpu_share, "threads": max(1, cpus // workers)}
    group_defaults = {**worker, "num_replicas": replicas}
    if isinstance(given, list):
        named = [_merge(group_defaults, group) if isinstance(group, dict) else group for group in given]
        overrides = {**overrides, "groups": named}
    fields: dict[str, Any] = {
        "model": model,
        "groups": groups,
        "group_defaults": group_defaults,
        "router": worker,
        "gateway": {"num_cpus": share},
        "links": {"transport": "unix"},
    }
    return AppSettings.model_validate(_merge(fields, overrides))


def _merge(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Section by section, so that a file which sets one value of a section keeps the others' defaults."""
    merged = dict(defaults)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _gpu_share(gpus: int, workers: int) -> float:
    """An equal part of a GPU for each: Ray places no replica over two GPUs, so the part divides one evenly."""
    return 0.0 if gpus == 0 else 1.0 / math.ceil(workers / gpus)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
