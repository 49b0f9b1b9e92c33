"""Whether something drifts: robust slopes over the samples of a long run. Numbers in, verdicts out."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Bound:
    """How much something may grow from the beginning to the end of a run: `share` of its level, `least` anyway.

    8 MiB in twenty minutes are 50 bytes for each of 170,000 requests. Latencies depend on whatever else the cores
    do: only what a user would notice counts.
    """

    least: float
    share: float

    def of(self, level: float) -> float:
        """The growth that is still none."""
        return max(self.least, self.share * level)


BOUNDS = {
    "rss_bytes": Bound(8 * MEBIBYTE, 0.03),
    "descriptors": Bound(4, 0.05),
    "threads": Bound(2, 0.05),
    "p50_ms": Bound(2.0, 0.25),
    "p99_ms": Bound(5.0, 0.5),
}


@dataclass(frozen=True)
class Trend:
    """What became of one quantity over the run.

    Attributes:
        subject: a process, or a kind of request.
        quantity: a name of `BOUNDS`, which has the unit in it.
        level: median over the run.
        growth: by the Theil-Sen slope, over the whole run.
        thirds: median of the last third less that of the first.
        bound: growth up to here is none.
        drifts: whether both say that it grew; a single step, or a few wild samples, move only one of them.
    """

    subject: str
    quantity: str
    level: float
    growth: float
    thirds: float
    bound: float
    drifts: bool


def trend(subject: str, quantity: str, times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Judge one series. With fewer than six samples nothing is said to drift.

    Args:
        times_s: increasing.
        values: one for each time.
    """
    level = statistics.median(values)
    bound = BOUNDS[quantity].of(level)
    if len(values) < 6:
        return Trend(subject, quantity, level, 0.0, 0.0, bound, False)
    growth = theil_sen(times_s, values) * (times_s[-1] - times_s[0])
    third = len(values) // 3
    thirds = statistics.median(values[-third:]) - statistics.median(values[:third])
    # The middles of the outer thirds are two thirds of the run apart.
    return Trend(subject, quantity, level, growth, thirds, bound, growth > bound and thirds > bound * 2 / 3)


def theil_sen(times: Sequence[float], values: Sequence[float]) -> float:
    """The median slope over all pairs of samples (Theil 1950, Sen 1968); a few wild ones move it little."""
    points = list(zip(times, values, strict=True))
    slopes = [(v - u) / (t - s) for (s, u), (t, v) in itertools.combinations(points, 2) if t > s]
    return statistics.median(slopes) if slopes else 0.0
