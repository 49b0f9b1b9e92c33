"""Sums over replicas, for the status page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def add_up(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers summed, maps key by key; histograms added bucket by bucket; all else left out. A part that lacks a
    key, or has None for it, adds nothing."""
    total: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if part.get(key) is not None]
        if values and all(isinstance(value, Mapping) for value in values):
            if "bounds" not in values[0]:
                total[key] = add_up(values)
            elif all(value.get("bounds") == values[0]["bounds"] for value in values):  # or of another version
                total[key] = _histogram(values)
        elif values and all(isinstance(value, int | float) for value in values):
            total[key] = sum(values)
    return total


def _histogram(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = [sum(column) for column in zip(*(part["counts"] for part in parts), strict=True)]
    return {"bounds": parts[0]["bounds"], "counts": counts, "sum": sum(part["sum"] for part in parts)}


def quantile(histogram: Mapping[str, Any], share: float) -> float | None:
    """The upper bound of the bucket in which a quantile lies; None of nothing, infinity beyond the last bound."""
    counts = histogram["counts"]
    wanted = share * sum(counts)
    seen = 0
    for bound, count in zip([*histogram["bounds"], float("inf")], counts, strict=True):
        seen += count
        if count and seen >= wanted:
            return float(bound)
    return None
