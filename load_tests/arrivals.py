"""Arrival traces for simulations: synthetic ones from fixed seeds, and recorded ones as JSON lines.

A recorded trace has one object per line, in order of time:

    {"time_s": 0.0132, "tokens": 48, "priority": 0.5, "timeout_s": 3.0}

`time_s` counts from the start of the trace, `tokens` are the rows of the request, `priority` goes from 0 (batch)
to 1 (interactive), and `timeout_s` is how long after `time_s` the caller leaves. Further fields are ignored.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace; see the module."""

    time_s: float
    tokens: int
    priority: float
    timeout_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.time_s) and self.time_s >= 0):
            raise ValueError(
                f"time_s is {self.time_s}; it must be a number of seconds from the start of the trace"
            )
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 1")
        if not 0 <= self.priority <= 1:
            raise ValueError(f"priority is {self.priority}; it must be between 0 and 1")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be a number of seconds above 0")

    @property
    def deadline_s(self) -> float:
        """When the caller leaves, from the start of the trace."""
        return self.time_s + self.timeout_s


# Draws one value; on average 1.
Draw = Callable[[random.Random], float]


@dataclass(frozen=True)
class Workload:
    """What one class of requests looks like.

    Attributes:
        mean_tokens: of its requests.
        timeout_s: the middle of its timeouts, which are spread evenly from half of it to one and a half.
    """

    priority: float
    mean_tokens: float
    timeout_s: float


INTERACTIVE = Workload(priority=1.0, mean_tokens=16, timeout_s=1.0)
DEFAULT = Workload(priority=0.5, mean_tokens=48, timeout_s=3.0)
BATCH = Workload(priority=0.0, mean_tokens=128, timeout_s=10.0)

# Interactive requests take so much of the capacity, however loaded the rest is; and less below full load.
_INTERACTIVE_SHARE = 0.3
# Of what is left, default and batch take this.
_DEFAULT_SHARE = 4 / 7


def mix(load: float) -> dict[Workload, float]:
    """The load of each class, as part of the capacity, where all of it together is `load`."""
    interactive = _INTERACTIVE_SHARE * min(load, 1.0)
    rest = load - interactive
    return {INTERACTIVE: interactive, DEFAULT: rest * _DEFAULT_SHARE, BATCH: rest * (1 - _DEFAULT_SHARE)}


# Synthetic traces ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How sizes and gaps are drawn, and when anything comes at all.

    Attributes:
        on_s, off_s: means of the phases with and without arrivals, all classes together; `off_s` of 0: always on.
    """

    size: Draw
    gap: Draw
    on_s: float = 1.0
    off_s: float = 0.0


def _exponential(chance: random.Random) -> float:
    return chance.expovariate(1.0)


def _pareto(alpha: float) -> Draw:
    """Pareto with mean 1: the smaller `alpha` (above 1), the heavier the tail."""
    return lambda chance: chance.paretovariate(alpha) * (alpha - 1) / alpha


def _lognormal(sigma: float) -> Draw:
    return lambda chance: chance.lognormvariate(-sigma * sigma / 2, sigma)


POISSON = Shape(size=_lognormal(0.7), gap=_exponential)
BURSTS = Shape(size=_lognormal(0.7), gap=_exponential, on_s=1.0, off_s=2.0)
HEAVY_TAILS = Shape(size=_pareto(1.3), gap=_lognormal(1.5))


def generate(
    shape: Shape,
    loads: dict[Workload, float],
    capacity_tokens_per_s: float,
    duration_s: float,
    max_tokens: int,
    seed: int = 0,
) -> list[Arrival]:
    """A trace in order of time.

    Args:
        loads: of each class, as part of the capacity, on average over on and off.
        max_tokens: no request is larger; rates make up for the tail that is cut off.
    """
    phases = list(_phases(shape, duration_s, random.Random(f"{seed} phases")))
    on_s = sum(end - start for start, end in phases)
    streams = []
    for workload, load in loads.items():
        if load > 0:
            tokens = load * capacity_tokens_per_s * duration_s
            chance = random.Random(f"{seed} {workload}")
            streams.append(_stream(shape, workload, tokens, on_s, max_tokens, chance))
    merged = heapq.merge(*streams, key=lambda arrival: arrival.time_s)
    return [_moved(arrival, phases) for arrival in merged]


def _stream(
    shape: Shape, workload: Workload, tokens: float, on_s: float, max_tokens: int, chance: random.Random
) -> Iterator[Arrival]:
    """Requests of one class with about so many `tokens` together, in time that counts only while on."""
    sizes: list[int] = []
    missing = tokens
    while missing > 0:
        sizes.append(min(max_tokens, max(1, round(workload.mean_tokens * shape.size(chance)))))
        missing -= sizes[-1]
    gaps = [shape.gap(chance) for _ in range(len(sizes) + 1)]
    scale = on_s / sum(gaps)
    for size, time_s in zip(sizes, itertools.accumulate(gaps), strict=False):
        timeout_s = workload.timeout_s * chance.uniform(0.5, 1.5)
        yield Arrival(time_s * scale, size, workload.priority, timeout_s)


def _phases(shape: Shape, duration_s: float, chance: random.Random) -> Iterator[tuple[float, float]]:
    """When something comes: from, to."""
    if shape.off_s == 0:
        yield 0.0, duration_s
        return
    now = 0.0
    while now < duration_s:
        end = now + shape.on_s * chance.uniform(0.5, 1.5)
        yield now, min(end, duration_s)
        now = end + shape.off_s * chance.uniform(0.5, 1.5)


def _moved(arrival: Arrival, phases: Sequence[tuple[float, float]]) -> Arrival:
    on_s = arrival.time_s
    for start, end in phases:
        if on_s <= end - start:
            return replace(arrival, time_s=start + on_s)
        on_s -= end - start
    return replace(arrival, time_s=phases[-1][1])


# Recorded traces -------------------------------------------------------------------------------------------------


def write(arrivals: Iterable[Arrival], path: Path) -> None:
    """Record a trace."""
    path.write_text("".join(json.dumps(asdict(arrival)) + "\n" for arrival in arrivals))


def read(path: Path) -> list[Arrival]:
    """A recorded trace.

    Raises:
        ValueError: a line is no arrival, or comes before the one above it; names the line. Or there is none.
    """
    arrivals: list[Arrival] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            arrival = Arrival(
                float(found["time_s"]), int(found["tokens"]), float(found["priority"]), float(found["timeout_s"])
            )
            if arrivals and arrival.time_s < arrivals[-1].time_s:
                raise ValueError("it comes before the line above it")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path.name}, line {number}: {error!r}") from error
        arrivals.append(arrival)
    if not arrivals:
        raise ValueError(f"{path.name} has no arrivals")
    return arrivals


def at_load(arrivals: Sequence[Arrival], load: float, capacity_tokens_per_s: float) -> list[Arrival]:
    """The same requests in the same rhythm, so fast or slow that they are `load` times the capacity."""
    tokens = sum(arrival.tokens for arrival in arrivals)
    scale = tokens / (load * capacity_tokens_per_s * max(arrivals[-1].time_s, 1e-9))
    return [replace(arrival, time_s=arrival.time_s * scale) for arrival in arrivals]


def split(arrivals: Iterable[Arrival], max_tokens: int) -> Iterator[Arrival]:
    """Larger requests in pieces, as pimoe's router submits them; each piece counts as a request."""
    for arrival in arrivals:
        for begin in range(0, arrival.tokens, max_tokens):
            yield replace(arrival, tokens=min(max_tokens, arrival.tokens - begin))
