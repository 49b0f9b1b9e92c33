"""How ways are compared: in turns, so that all meet the same disturbances, and by ratios within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


async def take_turns(rounds: int, ways: Mapping[str, Callable[[int], Awaitable[T]]]) -> dict[str, list[T]]:
    """What each way gives in each round, which it is told. Every round begins with another one."""
    found: dict[str, list[T]] = {way: [] for way in ways}
    names = list(ways)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(await ways[name](index))
    return found


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Of what was measured in the same round: a machine that gets slower from round to round moves it little."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def warm_up_calls(calls: int) -> int:
    """How many calls warm up for so many that are timed."""
    return max(2, calls // 10)


async def timed(call: Callable[[], Awaitable[object]], calls: int, warm_up: int | None = None) -> list[float]:
    """Seconds of each of `calls`, one after the other, after `warm_up` untimed ones (None: `warm_up_calls`)."""
    for _ in range(warm_up_calls(calls) if warm_up is None else warm_up):
        await call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        await call()
        times.append(time.perf_counter() - started)
    return times
