"""Hits over HTTP, beside the same request computed and beside a handler that does nothing, behind one HAProxy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from cache_requests import Asked, ask_both, get_status, post
from closed_loop import measure
from report import progress, table, target
from stand import QUIET, Stand
from wrk import Load

HIT, EMPTY, COMPUTED = "hit", "empty handler", "computed"
WAYS = (HIT, EMPTY, COMPUTED)
MOST_P50, LEAST_RATE = 1.5, 0.7  # the targets: of a hit, over the empty handler's
_NAME = "empty"
_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # as in deployments/app.py: it is faster so
_READY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Served:
    """One way to answer one request over so many connections.

    Attributes:
        requests_per_s, p50_us, p99_us: medians over rounds.
        failed: of all rounds together.
        rate_to_empty, p50_to_empty: over the empty handler's.
        generator: what asked.
    """

    request: str
    connections: int
    way: str
    requests_per_s: float
    p50_us: float
    p99_us: float
    failed: int
    rate_to_empty: float
    p50_to_empty: float
    generator: str


class EmptyHandler:
    """A Starlette application with routes that answer constants, as the gateway's replica has its own."""

    def __init__(self, answers: dict[str, tuple[bytes, str]]) -> None:
        self._answers = answers

    def __serve_build_asgi_app__(self) -> Any:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import Response
        from starlette.routing import Route

        def route(name: str, body: bytes, content_type: str) -> Route:
            async def answer(request: Request) -> Response:
                return Response(body, media_type=content_type)

            return Route(f"/{name}", answer, methods=["POST"])

        return Starlette(routes=[route(name, *answer) for name, answer in self._answers.items()])


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
    empty = _start_empty(cluster.url, asked, gateways)
    targets = {
        (one.name, way): target
        for one in asked
        for way, target in zip(
            WAYS, (one.target, one.elsewhere(f"{empty}/{one.name}"), one.past_the_cache()), strict=True
        )
    }
    cases = [(one.name, count, way) for one, count, way in product(asked, connections, WAYS)]
    loads: dict[tuple[str, int, str], list[Load]] = {case: [] for case in cases}
    try:
        for index in range(rounds):
            progress(f"cache over HTTP: round {index + 1} of {rounds}")
            for name, count, way in cases:
                loads[name, count, way].append(measure(targets[name, way], count, seconds))
            _check_hits(asked)
    finally:
        _stop_empty()
    return [_served(case, loads) for case in cases], gateways


def _start_empty(url: str, asked: Sequence[Asked], replicas: int) -> str:
    """Where it answers. As many replicas as the gateway, with the options that make the gateway fast."""
    from ray import serve

    progress("cache: starting an empty handler behind the same HAProxy")
    options: dict[str, Any] = {
        "num_replicas": replicas,
        "max_ongoing_requests": 100_000,
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": _ENVIRONMENT}},
    }
    answers = {one.name: (one.answer, one.content_type) for one in asked}
    application = serve.deployment(serve.ingress()(EmptyHandler), name=_NAME, **options).bind(answers)
    serve.run(application, name=_NAME, route_prefix=f"/{_NAME}", logging_config=QUIET)
    until = time.monotonic() + _READY_TIMEOUT_S
    for one in asked:
        while (found := post(one.elsewhere(f"{url}/{_NAME}/{one.name}")))[2] != one.answer:
            if time.monotonic() > until:
                raise RuntimeError(f"the empty handler answers {found[0]}: {found[2][:300]!r}")
            time.sleep(0.2)
    return f"{url}/{_NAME}"


def _stop_empty() -> None:
    from ray import serve

    serve.delete(_NAME)


def _check_hits(asked: Sequence[Asked]) -> None:
    for one in asked:
        status, headers, body = post(one.target)
        if (status, headers.get("x-pimoe-cache"), body) != (200, "hit", one.answer):
            raise RuntimeError(f"{one.name} is not answered by the cache any more: {status} {headers}")


def _served(case: tuple[str, int, str], loads: dict[tuple[str, int, str], list[Load]]) -> Served:
    rate, p50, p99 = _medians(loads[case])
    empty_rate, empty_p50, _ = _medians(loads[case[0], case[1], EMPTY])
    failed = sum(load.failed for load in loads[case])
    ratios = (rate / empty_rate, p50 / empty_p50)
    return Served(*case, rate, p50, p99, failed, *ratios, loads[case][0].generator)


def _medians(loads: Sequence[Load]) -> tuple[float, float, float]:
    rates, p50s, p99s = zip(*((load.requests_per_s, load.p50_us, load.p99_us) for load in loads), strict=True)
    return statistics.median(rates), statistics.median(p50s), statistics.median(p99s)


# For people ----------------------------------------------------------------------------------------------------


def served_table(results: Sequence[Served]) -> str:
    """Rates and latencies, and their ratios to the empty handler's."""
    title = f"The cache over HTTP, closed loop by {results[0].generator} (medians of rounds)"
    header = ("request", "connections", "way", "requests/s", "p50 ms", "p99 ms", "failed")
    rows = [
        (
            *(r.request, str(r.connections), r.way, f"{r.requests_per_s:,.0f}"),
            *(f"{r.p50_us / 1e3:,.2f}", f"{r.p99_us / 1e3:,.2f}", f"{r.failed}"),
            *(f"{r.rate_to_empty:.2f}x", f"{r.p50_to_empty:.2f}x"),
        )
        for r in results
    ]
    return table(title, (*header, "rate to empty", "p50 to empty"), rows)


def targets(results: Sequence[Served]) -> list[dict[str, Any]]:
    """Whether a hit is as near to the empty handler as it is to be."""
    return [row for r in results if r.way == HIT for row in _targets(r)]


def _targets(hit: Served) -> list[dict[str, Any]]:
    what = f"a {hit.request} from the cache to an empty handler, {hit.connections} connection(s)"
    p50, rate = hit.p50_to_empty, hit.rate_to_empty
    return [
        target(f"p50 of {what}", p50, MOST_P50, at_most=True),
        target(f"requests/s of {what}", rate, LEAST_RATE),
    ]


def worse_lines(results: Sequence[Served]) -> list[str]:
    """Where the cache costs more than doing nothing, or than computing."""
    found = [
        f"a {r.request} from the cache takes {r.p50_to_empty:.2f}x as long as the empty handler (p50) and gives "
        f"{r.rate_to_empty:.2f} of its requests/s, over {r.connections} connection(s)"
        for r in results
        if r.way == HIT and (r.p50_to_empty > 1 or r.rate_to_empty < 1)
    ]
    computed = {(r.request, r.connections): r for r in results if r.way == COMPUTED}
    return found + [
        f"a {r.request} from the cache is slower than computed, over {r.connections} connection(s)"
        for r in results
        if r.way == HIT and r.requests_per_s < computed[r.request, r.connections].requests_per_s
    ]
