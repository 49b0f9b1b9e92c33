"""Hits over HTTP, beside the same request computed and beside handlers that do nothing, behind one HAProxy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

from cache_empty import start_empty, stop_empty
from cache_requests import Asked, ask_both, get_status, post
from closed_loop import measure
from report import progress, table, target
from stand import Stand
from wrk import Load, Target

HIT, EMPTY, PAST_SERVE, COMPUTED = "hit", "empty handler", "empty handler, past Serve", "computed"
WAYS = (HIT, EMPTY, PAST_SERVE, COMPUTED)
MOST_P50, LEAST_RATE = 1.5, 0.7  # the targets: of a hit, over the empty handler's
MOST_ERRORS = 0.01  # of requests; more, and how fast the others were says nothing
_NAMES = {EMPTY: "empty", PAST_SERVE: "past-serve"}
_WARM_S = 1.0


@dataclass(frozen=True)
class Served:
    """One way to answer one request over so many connections.

    Attributes:
        requests_per_s, p50_us, p99_us: medians over rounds.
        failed: of all rounds together.
        fault: why these numbers are none: too many requests failed in one of the rounds.
        rate_to_empty, p50_to_empty: over the empty handler's; None where either has a fault.
        generator: what asked.
    """

    request: str
    connections: int
    way: str
    requests_per_s: float
    p50_us: float
    p99_us: float
    failed: int
    fault: str | None
    rate_to_empty: float | None
    p50_to_empty: float | None
    generator: str


def measure_served(
    cluster: Stand, rounds: int, seconds: float, connections: Sequence[int]
) -> tuple[list[Served], int]:
    """The application must be up, and is as before afterwards; also how many gateways it has.

    Raises:
        RuntimeError: something did not answer as it should.
    """
    status = get_status(cluster.url)
    model, gateways = status["model"], len(status["gateways"])
    asked = ask_both(cluster.url, model["name"], model["hidden_size"])
    groups = list(product(asked, connections))
    loads: dict[Case, list[Load]] = {(one.name, count, way): [] for one, count in groups for way in WAYS}
    with ExitStack() as stack:
        urls = {}
        for way, name in _NAMES.items():
            stack.callback(stop_empty, name)
            urls[way] = start_empty(cluster.url, asked, gateways, name, past_serve=way == PAST_SERVE)
        progress("cache over HTTP: warming up")
        for one, way in product(asked, WAYS):
            _load(one, way, urls, max(connections), _WARM_S)
        for index in range(rounds):
            progress(f"cache over HTTP: round {index + 1} of {rounds}")
            for one, count in groups:
                for way in turns(index):
                    loads[one.name, count, way].append(_load(one, way, urls, count, seconds))
            _check_hits(asked)
    return [served_of(case, loads) for case in loads], gateways


Case = tuple[str, int, str]  # as the first fields of what is served


def turns(index: int) -> tuple[str, ...]:
    """All ways; every round begins with another one."""
    first = index % len(WAYS)
    return WAYS[first:] + WAYS[:first]


def _load(one: Asked, way: str, urls: dict[str, str], connections: int, seconds: float) -> Load:
    """What it did; nothing of it is under way any more afterwards."""
    found = measure(_target(one, way, urls), connections, seconds)
    if way == COMPUTED:
        _until_idle(one)
    return found


def _target(one: Asked, way: str, urls: dict[str, str]) -> Target:
    if way in urls:
        return one.elsewhere(f"{urls[way]}/{one.name}")
    return one.past_the_cache() if way == COMPUTED else one.target


def _until_idle(one: Asked) -> None:
    """Wait for an answer that is computed: a load ends in the middle of requests, and what is computed for nobody
    any more would slow down what is measured next."""
    status, _, body = post(one.past_the_cache())
    if status != 200:
        raise RuntimeError(f"{one.name} is not computed any more: {status} {body[:300]!r}")


def _check_hits(asked: Sequence[Asked]) -> None:
    for one in asked:
        status, headers, body = post(one.target)
        if (status, headers.get("x-pimoe-cache"), body) != (200, "hit", one.answer):
            raise RuntimeError(f"{one.name} is not answered by the cache any more: {status} {headers}")


def served_of(case: Case, loads: dict[Case, list[Load]]) -> Served:
    """What rounds come to, beside those of the empty handler."""
    rate, p50, p99 = _medians(loads[case])
    base = loads[case[0], case[1], EMPTY]
    fault = _fault(loads[case])
    ratios: tuple[float | None, float | None] = (None, None)
    if fault is None and _fault(base) is None:
        empty_rate, empty_p50, _ = _medians(base)
        ratios = (rate / empty_rate, p50 / empty_p50)
    failed = sum(load.failed for load in loads[case])
    return Served(*case, rate, p50, p99, failed, fault, *ratios, loads[case][0].generator)


def _fault(loads: Sequence[Load]) -> str | None:
    return next((fault for load in loads if (fault := load.fault(MOST_ERRORS)) is not None), None)


def _medians(loads: Sequence[Load]) -> tuple[float, float, float]:
    rates, p50s, p99s = zip(*((load.requests_per_s, load.p50_us, load.p99_us) for load in loads), strict=True)
    return statistics.median(rates), statistics.median(p50s), statistics.median(p99s)


# For people ----------------------------------------------------------------------------------------------------


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def served_table(results: Sequence[Served]) -> str:
    """Rates and latencies, and their ratios to the empty handler's."""
    title = f"The cache over HTTP, closed loop by {results[0].generator} (medians of rounds)"
    header = ("request", "connections", "way", "requests/s", "p50 ms", "p99 ms", "failed")
    rows = [
        (
            *(r.request, str(r.connections), r.way, f"{r.requests_per_s:,.0f}"),
            *(f"{r.p50_us / 1e3:,.2f}", f"{r.p99_us / 1e3:,.2f}", f"{r.failed}"),
            *(_times(r.rate_to_empty), _times(r.p50_to_empty)),
        )
        for r in results
    ]
    return table(title, (*header, "rate to empty", "p50 to empty"), rows)


def targets(results: Sequence[Served]) -> list[dict[str, Any]]:
    """Whether a hit is as near to the empty handler as it is to be; missed where it could not be measured."""
    faults = {(r.request, r.connections, r.way): r.fault for r in results}
    return [row for r in results if r.way == HIT for row in _targets(r, faults[r.request, r.connections, EMPTY])]


def _targets(hit: Served, empty_fault: str | None) -> list[dict[str, Any]]:
    what = f"a {hit.request} from the cache to an empty handler, {hit.connections} connection(s)"
    rows = [
        target(f"p50 of {what}", hit.p50_to_empty or 0.0, MOST_P50, at_most=True),
        target(f"requests/s of {what}", hit.rate_to_empty or 0.0, LEAST_RATE),
    ]
    if hit.fault is None and empty_fault is None:
        return rows
    fault = f"{HIT}: {hit.fault}" if hit.fault is not None else f"{EMPTY}: {empty_fault}"
    return [{**row, "measured": f"nothing; {fault}", "value": None, "reached": False} for row in rows]


def worse_lines(results: Sequence[Served]) -> list[str]:
    """Where the cache costs more than doing nothing, or than computing, and where requests failed."""
    faults = [
        f"a {r.request}, {r.way}, over {r.connections} connection(s): not measured, {r.fault}"
        for r in results
        if r.fault is not None
    ]
    good = {(r.request, r.connections, r.way): r for r in results if r.fault is None}
    found = [line for r in good.values() if r.way == HIT for line in _slower(r, good)]
    return [*faults, *found]


def _slower(hit: Served, good: dict[Case, Served]) -> list[str]:
    where, lines = f"over {hit.connections} connection(s)", []
    for way in (EMPTY, PAST_SERVE):
        other = good.get((hit.request, hit.connections, way))
        if other is not None and (hit.p50_us > other.p50_us or hit.requests_per_s < other.requests_per_s):
            p50, rate = hit.p50_us / other.p50_us, hit.requests_per_s / other.requests_per_s
            lines.append(
                f"a {hit.request} from the cache takes {p50:.2f}x as long as the {way} (p50) and gives "
                f"{rate:.2f} of its requests/s, {where}"
            )
    computed = good.get((hit.request, hit.connections, COMPUTED))
    if computed is not None and hit.requests_per_s < computed.requests_per_s:
        lines.append(f"a {hit.request} from the cache is slower than computed, {where}")
    return lines
