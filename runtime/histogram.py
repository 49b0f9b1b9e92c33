"""A histogram with fixed bounds: what waits, sizes and durations are counted in."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Histogram:
    """Counts per bucket, and the sum of what was added."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> dict[str, Any]:
        """Plain values: `bounds`, `counts` of each bucket and of what is beyond the last, `sum`."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}
