"""The page of `/metrics`: every replica's counters, gathered by whichever gateway is asked, in Prometheus' format.

All counters are cumulative in their own process and carry its replica as a label, so that rates and sums are right
whichever gateway a scrape meets. Labels come from fixed sets (routes, classes, reasons, groups) or from the
deployment (replicas): never from a request, a tenant or a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Replica = Mapping[str, Any]
# Field of the statistics, name, text and kind of each metric.
_Table: TypeAlias = Sequence[tuple[str, str, str, Callable[..., Any]]]


def render(status: dict[str, Any]) -> tuple[bytes, str]:
    """The page, from the status of the whole application; body and content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(status))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Page(Collector):
    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from _request_families(self._status["gateways"])
        yield from _cache_families(self._status["gateways"])
        yield from _queue_families(self._status["routers"])
        yield from _batch_families(self._status["routers"])
        yield from _engine_families(self._status["routers"])
        yield from _dispatch_families(self._status["routers"])
        yield from _group_families(self._status["groups"])
        yield _refused_settings(self._status)


_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_SECOND: _Table = (
    ("written", "pimoe_cache_second_written", "Answers written to the second level", _COUNTER),
    ("read_bytes", "pimoe_cache_second_read_bytes", "Read from it", _COUNTER),
    ("written_bytes", "pimoe_cache_second_written_bytes", "Written to it", _COUNTER),
    ("pending", "pimoe_cache_second_pending", "Answers waiting to be written", _GAUGE),
    ("breaker_open", "pimoe_cache_second_breaker_open", "Whether it is left alone for its failures", _GAUGE),
    ("breaker_opened", "pimoe_cache_second_breaker_opened", "How often that began", _COUNTER),
)

# Gateways --------------------------------------------------------------------------------------------------------


def _request_families(gateways: Sequence[Replica]) -> Iterator[Metric]:
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
            for route, histogram in requests[name].items():
                _add_histogram(family, [route, replica], histogram)
    yield from (total, running, duration, first)


def _add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Mapping[str, Any]) -> None:
    total, buckets = 0, []
    for bound, count in zip([*map(str, histogram["bounds"]), "+Inf"], histogram["counts"], strict=True):
        total += count
        buckets.append((bound, float(total)))
    family.add_metric(labels, buckets, histogram["sum"])


_CACHE_BYTES = (("bytes", "held"), ("target_bytes", "allowed now"), ("max_bytes", "allowed at most"))
_CACHE_DROPS = ("evicted", "expired", "too_large", "rejected", "flushed")


def _cache_families(gateways: Sequence[Replica]) -> Iterator[Metric]:
    labels = ["replica"]
    requests = CounterMetricFamily(
        "pimoe_cache_requests", "Requests by what answered them", labels=["outcome", *labels]
    )
    bypassed = CounterMetricFamily("pimoe_cache_bypassed", "Requests left alone", labels=["reason", *labels])
    dropped = CounterMetricFamily("pimoe_cache_dropped", "Entries in memory, gone", labels=["reason", *labels])
    superseded = CounterMetricFamily("pimoe_cache_superseded", "Computations begun beside another", labels=labels)
    entries = GaugeMetricFamily("pimoe_cache_entries", "Entries in memory", labels=labels)
    sizes = GaugeMetricFamily("pimoe_cache_bytes", "Memory by what it is", labels=["kind", *labels])
    for gateway in gateways:
        key, cache = [gateway["id"]], gateway["cache"]
        entries.add_metric(key, cache["entries"])
        superseded.add_metric(key, cache["superseded"])
        for field, kind in _CACHE_BYTES:
            sizes.add_metric([kind, *key], cache[field])
        counted = ((requests, cache["outcomes"]), (bypassed, cache["bypass_reasons"]))
        for family, counts in (*counted, (dropped, {name: cache[name] for name in _CACHE_DROPS})):
            for name, count in counts.items():
                family.add_metric([name, *key], count)
    yield from (requests, bypassed, dropped, superseded, entries, sizes)
    yield from _second_level_families([g for g in gateways if g["cache"]["second"] is not None])
    yield from _prefetch_families(gateways)
    yield from _prompt_families([gateway for gateway in gateways if gateway.get("prompts")])


def _second_level_families(gateways: Sequence[Replica]) -> Iterator[Metric]:
    labels = ["replica"]
    lookups = CounterMetricFamily(
        "pimoe_cache_second_lookups", "Look-ups in the second level", labels=["outcome", *labels]
    )
    dropped = CounterMetricFamily(
        "pimoe_cache_second_dropped", "Answers not written to it", labels=["reason", *labels]
    )
    for gateway in gateways:
        key, second = [gateway["id"]], gateway["cache"]["second"]
        for name, count in {"hit": second["hits"], **second["misses"]}.items():
            lookups.add_metric([name, *key], count)
        for name, count in second["dropped"].items():
            dropped.add_metric([name, *key], count)
    yield from (lookups, dropped)
    parts = [([gateway["id"]], gateway["cache"]["second"]) for gateway in gateways]
    yield from _scalars(_SECOND, parts, labels)


def _prefetch_families(gateways: Sequence[Replica]) -> Iterator[Metric]:
    events = CounterMetricFamily("pimoe_cache_prefetch", "What prefetching did", labels=["event", "replica"])
    for gateway in gateways:
        for name in ("predicted", "warmed", "useful", "wasted", "cancelled", "failed"):
            events.add_metric([name, gateway["id"]], gateway["cache"]["prefetch"][name])
    yield events


_PROMPTS: _Table = (
    ("evicted", "pimoe_prompt_cache_evicted", "Prompts of chats that made room for others", _COUNTER),
    ("entries", "pimoe_prompt_cache_entries", "Prompts of chats held as token ids", _GAUGE),
    ("bytes", "pimoe_prompt_cache_bytes", "Memory of them", _GAUGE),
    ("trimmed_chats", "pimoe_chats_trimmed", "Chats that their mode made shorter", _COUNTER),
    ("trimmed_messages", "pimoe_chat_messages_trimmed", "Messages left out of them", _COUNTER),
)


def _prompt_families(gateways: Sequence[Replica]) -> Iterator[Metric]:
    labels = ["replica"]
    lookups = CounterMetricFamily(
        "pimoe_prompt_cache_lookups", "Prompts and counts of tokens asked for", labels=["outcome", *labels]
    )
    for gateway in gateways:
        lookups.add_metric(["hit", gateway["id"]], gateway["prompts"]["hits"])
        lookups.add_metric(["miss", gateway["id"]], gateway["prompts"]["misses"])
    yield lookups
    yield from _scalars(_PROMPTS, [([gateway["id"]], gateway["prompts"]) for gateway in gateways], labels)


# Routers ---------------------------------------------------------------------------------------------------------


def _parts(routers: Sequence[Replica]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Everything with a queue: whose, where, and its statistics."""
    for router in routers:
        for kind, name in (("tensors", "batcher"), ("generation", "engine")):
            if router["statistics"][name] is not None:
                yield kind, router["id"], router["statistics"][name]


def _queue_families(routers: Sequence[Replica]) -> Iterator[Metric]:
    labels = ["queue", "class", "replica"]
    wait = HistogramMetricFamily("pimoe_queue_wait_seconds", "Arrival to dispatch", labels=labels)
    gauges: dict[str, Any] = {
        "items": GaugeMetricFamily("pimoe_queue_requests", "Requests waiting", labels=labels),
        "tokens": GaugeMetricFamily("pimoe_queue_tokens", "Tokens waiting", labels=labels),
    }
    texts = {
        "refused": "Turned away by a full queue",
        "shed": "Given up under overload",
        "expired": "Out of time before anything was computed",
        "cancelled": "Left by their callers while waiting",
    }
    counters: dict[str, Any] = {
        name: CounterMetricFamily(f"pimoe_queue_{name}", text, labels=labels) for name, text in texts.items()
    }
    rate = GaugeMetricFamily(
        "pimoe_queue_drain_tokens_per_second", "How fast a backlog is worked off", labels=["queue", "replica"]
    )
    for kind, replica, statistics in _parts(routers):
        queue = statistics["queue"]
        rate.add_metric([kind, replica], queue["tokens_per_s"])
        for name, books in queue["classes"].items():
            key = [kind, name, replica]
            _add_histogram(wait, key, books["waits"])
            for field, family in (*gauges.items(), *counters.items()):
                family.add_metric(key, books[field])
    yield from (wait, rate, *gauges.values(), *counters.values())


def _batch_families(routers: Sequence[Replica]) -> Iterator[Metric]:
    labels = ["replica"]
    size = HistogramMetricFamily("pimoe_batch_tokens", "Tokens of a batch", labels=labels)
    closed = CounterMetricFamily("pimoe_batches_closed", "Batches by close reason", labels=["reason", *labels])
    in_flight = GaugeMetricFamily("pimoe_batches_in_flight", "Batches downstream", labels=labels)
    limit = GaugeMetricFamily("pimoe_batch_limit_tokens", "Largest batch allowed now", labels=labels)
    busy = GaugeMetricFamily("pimoe_batch_utilisation_ratio", "Time with a batch downstream", labels=labels)
    kinds = ["queue", "replica"]
    error = GaugeMetricFamily("pimoe_latency_model_error_ratio", "Mean relative residual", labels=kinds)
    trusted = GaugeMetricFamily("pimoe_latency_model_trusted", "Whether batches are sized by it", labels=kinds)
    for router in routers:
        replica, batcher = [router["id"]], router["statistics"]["batcher"]
        _add_histogram(size, replica, batcher["sizes"])
        for reason, count in batcher["closed"].items():
            closed.add_metric([reason, *replica], count)
        in_flight.add_metric(replica, batcher["in_flight"])
        limit.add_metric(replica, batcher["max_batch_tokens"])
        busy.add_metric(replica, batcher["utilisation"])
    for kind, name, statistics in _parts(routers):
        error.add_metric([kind, name], statistics["latency"]["error_ratio"])
        trusted.add_metric([kind, name], statistics["latency"]["trusted"])
    yield from (size, closed, in_flight, limit, busy, error, trusted)


_ENGINE: _Table = (
    ("running", "pimoe_sequences_running", "Sequences that are generated", _GAUGE),
    ("preempted", "pimoe_sequences_preempted", "Sequences that gave their KV blocks up and wait", _GAUGE),
    ("preemptions", "pimoe_preemptions", "Times that a sequence gave its KV blocks up", _COUNTER),
    ("kv_bytes", "pimoe_kv_cache_bytes", "Memory of the KV cache", _GAUGE),
    ("steps", "pimoe_engine_steps", "Steps of all running sequences", _COUNTER),
    ("step_s", "pimoe_engine_step_seconds", "Time spent in steps", _COUNTER),
    ("prefill_tokens", "pimoe_prefill_tokens", "Prompt tokens computed", _COUNTER),
    ("decode_tokens", "pimoe_decode_tokens", "Tokens generated after a first one", _COUNTER),
)


_KV_BLOCKS: _Table = (
    (
        "prefix_query_tokens",
        "pimoe_prefix_cache_query_tokens",
        "Prompt tokens looked up",
        _COUNTER,
    ),
    ("prefix_hit_tokens", "pimoe_prefix_cache_hit_tokens", "Prompt tokens that were there", _COUNTER),
    ("evictions", "pimoe_kv_block_evictions", "Blocks of known prefixes given away", _COUNTER),
)
_MICRO_BATCHES: _Table = (
    ("single", "pimoe_single_batch_steps", "Steps in one batch", _COUNTER),
    ("double", "pimoe_micro_batch_steps", "Steps in two micro-batches", _COUNTER),
    ("probes", "pimoe_micro_batch_probes", "Steps in two to find out what they take", _COUNTER),
    ("predicted_gain", "pimoe_micro_batch_predicted_gain_ratio", "One batch over two, as expected", _GAUGE),
    ("measured_gain", "pimoe_micro_batch_measured_gain_ratio", "One batch over two, as measured", _GAUGE),
)


def _engine_families(routers: Sequence[Replica]) -> Iterator[Metric]:
    all_engines = [([router["id"]], router["statistics"]["engine"]) for router in routers]
    engines = [(name, engine) for name, engine in all_engines if engine is not None]
    yield from _scalars(_ENGINE, engines, ["replica"])
    for part, table in (("kv_blocks", _KV_BLOCKS), ("micro_batches", _MICRO_BATCHES)):
        yield from _scalars(table, [(name, engine[part]) for name, engine in engines], ["replica"])
    labels = ["replica"]
    blocks = GaugeMetricFamily("pimoe_kv_blocks", "Blocks of the KV cache", labels=["kind", *labels])
    parts = GaugeMetricFamily("pimoe_forward_part_seconds", "Mean time in a forward", labels=["kind", *labels])
    first = HistogramMetricFamily("pimoe_time_to_first_token_seconds", "Arrival to first token", labels=labels)
    between = HistogramMetricFamily("pimoe_inter_token_latency_seconds", "Token to token", labels=labels)
    for name, engine in engines:
        for state in ("free", "kept", "held"):
            blocks.add_metric([state, *name], engine["kv_blocks"][state])
        for part in ("trunk", "expert", "link"):
            parts.add_metric([part, *name], engine["micro_batches"][f"{part}_s"])
        _add_histogram(first, name, engine["first_token_s"])
        _add_histogram(between, name, engine["between_tokens_s"])
    yield from (blocks, parts, first, between)


def _scalars(
    table: _Table,
    parts: Sequence[tuple[list[str], Mapping[str, Any]]],
    labels: list[str],
) -> Iterator[Metric]:
    for field, name, text, kind in table:
        family = kind(name, text, labels=labels)
        for key, statistics in parts:
            family.add_metric(key, statistics[field])
        yield family


def _dispatch_families(routers: Sequence[Replica]) -> Iterator[Metric]:
    rows = CounterMetricFamily("pimoe_dispatch_rows", "Rows sent to a group", labels=["group", "replica"])
    pairs = CounterMetricFamily("pimoe_expert_tokens", "Tokens sent to an expert", labels=["expert", "replica"])
    linked = GaugeMetricFamily("pimoe_group_replicas", "Replicas linked", labels=["group", "replica"])
    waiting = CounterMetricFamily("pimoe_dispatch_wait_seconds", "Waiting for groups", labels=["replica"])
    uneven = GaugeMetricFamily(
        "pimoe_expert_imbalance_ratio", "Tokens of the most loaded expert over the mean", labels=["replica"]
    )
    for router in routers:
        replica, dispatch = router["id"], router["statistics"]["dispatch"]
        waiting.add_metric([replica], dispatch["waiting_s"])
        uneven.add_metric([replica], dispatch["imbalance_ratio"])
        for group, count in zip(router["groups"], dispatch["group_rows"], strict=True):
            rows.add_metric([group["name"], replica], count)
            linked.add_metric([group["name"], replica], group["replicas"])
        for expert, count in enumerate(dispatch.get("expert_pairs", ())):
            pairs.add_metric([str(expert), replica], count)
    yield from (rows, pairs, linked, waiting, uneven)


# Expert groups ---------------------------------------------------------------------------------------------------


def _group_families(groups: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
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


def _refused_settings(status: Mapping[str, Any]) -> Metric:
    refused = GaugeMetricFamily(
        "pimoe_settings_refused", "Whether the latest live settings were wrong", labels=["deployment", "replica"]
    )
    groups = [replica for group in status["groups"] for replica in group["replicas"]]
    for replica in (*status["gateways"], *status["routers"], *groups):
        refused.add_metric([replica["deployment"], replica["id"]], bool(replica.get("refused_settings")))
    return refused
