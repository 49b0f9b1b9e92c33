"""The page of `/metrics`: every replica's counters, gathered by whichever gateway is asked, in Prometheus' format.

All counters are cumulative in their own process and carry its replica as a label, so that rates and sums are right
whichever gateway a scrape meets. Experts are labelled in sum over requests only.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def _route(path: str) -> str:
    """A label for a path, out of a fixed set: paths are the client's, and labels must be bounded."""
    known = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/admin/status", "/metrics", "/health")
    if path in known:
        return path
    for ending in ("/infer", "/infer_many", "/ready", "/live"):
        if path.startswith("/v2/") and path.endswith(ending):
            return "/v2" + ending
    return "other"


class _Histogram:
    """Seconds of one route: cumulative buckets are made when read."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_BUCKETS_S, seconds)] += 1
        self.sum_s += seconds


class GatewayMetrics:
    """Counts and times the requests of one gateway."""

    def __init__(self) -> None:
        self._statuses: Counter[tuple[str, int]] = Counter()
        self._durations: dict[str, _Histogram] = {}
        self._first_bytes: dict[str, _Histogram] = {}
        self._running = 0

    def observe(self, app: ASGIApp) -> ASGIApp:
        """The application with its requests counted."""

        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await self._observe_request(app, scope, receive, send)

        return observed

    async def _observe_request(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        route, started = _route(scope["path"]), time.monotonic()
        status, has_body = 499, False  # a client that left before it was answered

        async def watch(message: Message) -> None:
            nonlocal status, has_body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not has_body and message.get("body"):
                has_body = True
                self._first_bytes.setdefault(route, _Histogram()).add(time.monotonic() - started)
            await send(message)

        self._running += 1
        try:
            await app(scope, receive, watch)
        finally:
            self._running -= 1
            self._statuses[route, status] += 1
            self._durations.setdefault(route, _Histogram()).add(time.monotonic() - started)

    def snapshot(self) -> dict[str, Any]:
        """Plain values, to be sent to the gateway that renders the page."""
        return {
            "running": self._running,
            "statuses": [[route, status, count] for (route, status), count in self._statuses.items()],
            "durations": {route: [h.counts, h.sum_s] for route, h in self._durations.items()},
            "first_bytes": {route: [h.counts, h.sum_s] for route, h in self._first_bytes.items()},
        }


def render(status: dict[str, Any]) -> tuple[bytes, str]:
    """The page, from the status of the whole application; body and content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(status))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Page(Collector):
    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from _gateway_families(self._status["gateways"])
        yield from _router_families(self._status["routers"])
        yield from _group_families(self._status["groups"])


def _gateway_families(gateways: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["route", "replica"]
    total = CounterMetricFamily("pimoe_requests", "HTTP requests answered", labels=[*labels, "status"])
    running = GaugeMetricFamily("pimoe_requests_running", "HTTP requests under way", labels=["replica"])
    duration = HistogramMetricFamily("pimoe_request_duration_seconds", "Request to last byte", labels=labels)
    first = HistogramMetricFamily("pimoe_time_to_first_byte_seconds", "Request to first byte", labels=labels)
    for gateway in gateways:
        replica, requests = gateway["id"], gateway["requests"]
        running.add_metric([replica], requests["running"])
        for route, status, count in requests["statuses"]:
            total.add_metric([route, replica, str(status)], count)
        for family, name in ((duration, "durations"), (first, "first_bytes")):
            for route, (counts, sum_s) in requests[name].items():
                family.add_metric([route, replica], _cumulative(counts), sum_s)
    yield from (total, running, duration, first)
    yield from _flat("pimoe_cache", "Result cache", [(g["id"], g["cache"]) for g in gateways])


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip([*map(str, _BUCKETS_S), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def _router_families(routers: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    rows = CounterMetricFamily("pimoe_dispatch_rows", "Rows sent to a group", labels=["group", "replica"])
    pairs = CounterMetricFamily("pimoe_expert_tokens", "Tokens sent to an expert", labels=["expert", "replica"])
    closed = CounterMetricFamily("pimoe_batches_closed", "Batches by close reason", labels=["reason", "replica"])
    linked = GaugeMetricFamily("pimoe_group_replicas", "Replicas linked", labels=["group", "replica"])
    for router in routers:
        replica, statistics = router["id"], router["statistics"]
        for group, count in zip(router["groups"], statistics["dispatch"]["group_rows"], strict=True):
            rows.add_metric([group["name"], replica], count)
            linked.add_metric([group["name"], replica], group["replicas"])
        for expert, count in enumerate(statistics["dispatch"]["expert_pairs"]):
            pairs.add_metric([str(expert), replica], count)
        for reason, count in statistics["batcher"]["closed"].items():
            closed.add_metric([reason, replica], count)
    yield from (rows, pairs, closed, linked)
    engines = [(r["id"], r["statistics"]["engine"]) for r in routers if r["statistics"]["engine"]]
    yield from _flat("pimoe_engine", "Generation engine", engines)
    batchers = [(r["id"], r["statistics"]["batcher"]) for r in routers]
    yield from _flat("pimoe_batcher", "Tensor batcher", batchers)
    yield from _flat("pimoe_batcher_queue", "Tensor queue", [(i, b["queue"]) for i, b in batchers])
    yield from _flat("pimoe_engine_queue", "Generation queue", [(i, e["queue"]) for i, e in engines])


def _group_families(groups: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["group", "replica"]
    weights = GaugeMetricFamily("pimoe_group_weights_bytes", "Expert weights held", labels=labels)
    busy = CounterMetricFamily("pimoe_group_busy_seconds", "Time spent computing", labels=labels)
    rows = CounterMetricFamily("pimoe_group_rows", "Rows computed", labels=labels)
    for group in groups:
        for replica in group["replicas"]:
            key, statistics = [group["name"], replica["id"]], replica["statistics"]
            weights.add_metric(key, replica["weights_bytes"])
            busy.add_metric(key, statistics["busy_s"])
            rows.add_metric(key, statistics["rows"])
    yield from (weights, busy, rows)


# Statistics that go up and down; all others are counters since start.
_GAUGES = {"entries", "bytes", "max_bytes", "items", "in_flight", "running", "kv_bytes"}


def _flat(prefix: str, what: str, parts: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    """One family per number in the replicas' statistics."""
    names = parts[0][1] if parts else {}
    for name in [n for n, value in names.items() if isinstance(value, int | float)]:
        is_gauge = name in _GAUGES or (prefix.endswith("queue") and name == "tokens")
        kind = GaugeMetricFamily if is_gauge else CounterMetricFamily
        unit = name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name
        family = kind(f"{prefix}_{unit}", f"{what}: {name}", labels=["replica"])
        for replica, statistics in parts:
            family.add_metric([replica], statistics[name])
        yield family
