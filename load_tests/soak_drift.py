"""Whether something drifts: robust slopes over the samples of a long run. Numbers in, verdicts out."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MEBIBYTE = 2**20
_PARTS = 6  # of a run; that many samples at least are judged


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
        lately: as `growth`, had the whole run gone as its second half.
        steady: as `growth`, without the largest jump between two sixths of the run.
        bound: growth up to here is none.
        excess: the least of the four over what it may be; at most 0 for what does not grow.
        drifts: whether all four say that it grew. What levels off (pools of connections that are kept alive,
            caches) does not grow lately, a single step is not steady, and a few wild samples move no median.
    """

    subject: str
    quantity: str
    level: float
    growth: float
    thirds: float
    lately: float
    steady: float
    bound: float
    excess: float
    drifts: bool


def trend(subject: str, quantity: str, times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Judge one series. With fewer than six samples nothing is said to drift.

    Args:
        times_s: increasing.
        values: one for each time.
    """
    level = statistics.median(values)
    bound = BOUNDS[quantity].of(level)
    if len(values) < _PARTS:
        return Trend(subject, quantity, level, 0.0, 0.0, 0.0, 0.0, bound, 0.0, False)
    run_s, third, half = times_s[-1] - times_s[0], len(values) // 3, len(values) // 2
    growth = theil_sen(times_s, values) * run_s
    lately = theil_sen(times_s[half:], values[half:]) * run_s
    thirds = statistics.median(values[-third:]) - statistics.median(values[:third])
    # The middles of the outer thirds are two thirds of the run apart.
    # A leak that slows down is one still: half of the speed is enough lately.
    excess = min(growth, thirds * 3 / 2, 2 * lately, steady := _steady(values)) / bound
    return Trend(subject, quantity, level, growth, thirds, lately, steady, bound, excess, excess > 1)


def _steady(values: Sequence[float]) -> float:
    # No mean of two: a step in the middle of a part would be two halves of one.
    edges = [len(values) * index // _PARTS for index in range(_PARTS + 1)]
    levels = [statistics.median_low(values[start:end]) for start, end in itertools.pairwise(edges)]
    jumps = sorted(after - before for before, after in itertools.pairwise(levels))
    return sum(jumps[:-1]) * _PARTS / (len(jumps) - 1)


def theil_sen(times: Sequence[float], values: Sequence[float]) -> float:
    """The median slope over all pairs of samples (Theil 1950, Sen 1968); a few wild ones move it little."""
    points = list(zip(times, values, strict=True))
    slopes = [(v - u) / (t - s) for (s, u), (t, v) in itertools.combinations(points, 2) if t > s]
    return statistics.median(slopes) if slopes else 0.0
