"""The page of `/metrics` from pages of `/admin/status` made by hand, read back by Prometheus' own parser."""

from __future__ import annotations

import re
from typing import Any

import pytest
import status_pages as pages
from pimoe.deployments.metrics_page import render
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

CLASSES = ("batch", "low", "default", "high", "interactive")

# What an operator was promised; counters by the names that Prometheus stores.
PROMISED = {
    "pimoe_queue_wait_seconds_bucket": {"queue", "class", "replica", "le"},
    "pimoe_queue_requests": {"queue", "class", "replica"},
    "pimoe_queue_tokens": {"queue", "class", "replica"},
    "pimoe_queue_refused_total": {"queue", "class", "replica"},
    "pimoe_queue_shed_total": {"queue", "class", "replica"},
    "pimoe_queue_expired_total": {"queue", "class", "replica"},
    "pimoe_queue_cancelled_total": {"queue", "class", "replica"},
    "pimoe_queue_drain_tokens_per_second": {"queue", "replica"},
    "pimoe_batch_tokens_bucket": {"replica", "le"},
    "pimoe_batches_closed_total": {"reason", "replica"},
    "pimoe_batches_in_flight": {"replica"},
    "pimoe_batch_limit_tokens": {"replica"},
    "pimoe_batch_utilisation_ratio": {"replica"},
    "pimoe_latency_model_error_ratio": {"queue", "replica"},
    "pimoe_latency_model_trusted": {"queue", "replica"},
    "pimoe_sequences_running": {"replica"},
    "pimoe_sequences_preempted": {"replica"},
    "pimoe_preemptions_total": {"replica"},
    "pimoe_kv_cache_bytes": {"replica"},
    "pimoe_kv_blocks": {"kind", "replica"},
    "pimoe_prefix_cache_query_tokens_total": {"replica"},
    "pimoe_prefix_cache_hit_tokens_total": {"replica"},
    "pimoe_kv_block_evictions_total": {"replica"},
    "pimoe_single_batch_steps_total": {"replica"},
    "pimoe_micro_batch_steps_total": {"replica"},
    "pimoe_micro_batch_probes_total": {"replica"},
    "pimoe_micro_batch_predicted_gain_ratio": {"replica"},
    "pimoe_micro_batch_measured_gain_ratio": {"replica"},
    "pimoe_forward_part_seconds": {"kind", "replica"},
    "pimoe_time_to_first_token_seconds_bucket": {"replica", "le"},
    "pimoe_inter_token_latency_seconds_bucket": {"replica", "le"},
    "pimoe_engine_step_seconds_total": {"replica"},
    "pimoe_prefill_tokens_total": {"replica"},
    "pimoe_decode_tokens_total": {"replica"},
    "pimoe_dispatch_rows_total": {"group", "replica"},
    "pimoe_dispatch_wait_seconds_total": {"replica"},
    "pimoe_expert_imbalance_ratio": {"replica"},
    "pimoe_group_replicas": {"group", "replica"},
    "pimoe_group_rows_total": {"group", "replica"},
    "pimoe_group_busy_seconds_total": {"group", "replica"},
    "pimoe_group_weights_bytes": {"group", "replica"},
    "pimoe_requests_total": {"route", "status", "replica"},
    "pimoe_requests_running": {"replica"},
    "pimoe_settings_refused": {"deployment", "replica"},
    "pimoe_request_duration_seconds_bucket": {"route", "replica", "le"},
    "pimoe_time_to_first_byte_seconds_bucket": {"route", "replica", "le"},
    "pimoe_cache_requests_total": {"outcome", "replica"},
    "pimoe_cache_bypassed_total": {"reason", "replica"},
    "pimoe_cache_dropped_total": {"reason", "replica"},
    "pimoe_cache_superseded_total": {"replica"},
    "pimoe_cache_entries": {"replica"},
    "pimoe_cache_bytes": {"kind", "replica"},
    "pimoe_cache_prefetch_total": {"event", "replica"},
    "pimoe_prompt_cache_lookups_total": {"outcome", "replica"},
    "pimoe_prompt_cache_evicted_total": {"replica"},
    "pimoe_prompt_cache_entries": {"replica"},
    "pimoe_prompt_cache_bytes": {"replica"},
    "pimoe_chats_trimmed_total": {"replica"},
    "pimoe_chat_messages_trimmed_total": {"replica"},
}
SECOND = {
    "pimoe_cache_second_lookups_total": {"outcome", "replica"},
    "pimoe_cache_second_dropped_total": {"reason", "replica"},
    "pimoe_cache_second_written_total": {"replica"},
    "pimoe_cache_second_read_bytes_total": {"replica"},
    "pimoe_cache_second_written_bytes_total": {"replica"},
    "pimoe_cache_second_pending": {"replica"},
    "pimoe_cache_second_breaker_open": {"replica"},
    "pimoe_cache_second_breaker_opened_total": {"replica"},
}


def text_of(status: dict[str, Any]) -> str:
    body, content_type = render(status)
    assert content_type.startswith("text/plain; version=")
    return body.decode()


def families_of(status: dict[str, Any]) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text_of(status))}


def samples_of(status: dict[str, Any], name: str, /, **labels: str) -> list[float]:
    return [
        sample.value
        for family in families_of(status).values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def labels_of(status: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in families_of(status).values():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def busy(second: bool = False, per_expert: bool = False) -> dict[str, Any]:
    """Something of everything, on two routers and two gateways."""
    tensors = pages.queue(interactive={"items": 2, "tokens": 20, "waits": [0.0005, 0.3, 100.0]}, low={"shed": 4})
    text = pages.queue(batch={"expired": 5, "refused": 6, "cancelled": 7})
    fields = {
        "closed": {"idle": 2, "full": 1},
        "in_flight": 1,
        "utilisation": 0.25,
        "latency": {"trusted": True, "error_ratio": 0.125},
    }
    routers = [
        pages.router(
            name, per_expert, batcher=pages.batcher(tensors, (5, 70_000), **fields), engine=pages.engine(text)
        )
        for name in ("r1", "r2")
    ]
    requests = (("/v1/completions", 200, 3), ("/v1/completions", 429, 2), ("other", 404, 1))
    gateways = [pages.gateway(name, second, requests) for name in ("g1", "g2")]
    for gateway in gateways:
        gateway["cache"]["outcomes"].update(memory=8, second=9)
    return pages.page(routers, gateways)


@pytest.mark.parametrize("second", [False, True])
def test_every_promised_family_is_there_with_these_labels(second: bool) -> None:
    found = labels_of(busy(second))
    wanted = PROMISED | (SECOND if second else {})
    assert {name: found.get(name) for name in wanted} == wanted
    # And nothing besides: what is added is named here, and looked at for its labels.
    rest = found.keys() - wanted.keys()
    assert {re.sub("_(bucket|sum|count)$", "_bucket", name) for name in rest} <= {
        *wanted,
        "pimoe_engine_steps_total",
    }


def test_the_page_is_written_as_prometheus_wants_it() -> None:
    status = busy(second=True, per_expert=True)
    text = text_of(status)
    assert text.endswith("\n")
    for name, family in families_of(status).items():
        assert name.startswith("pimoe_")
        assert family.documentation, name
        assert family.type in ("counter", "gauge", "histogram"), name
        for sample in family.samples:
            assert (sample.name == f"{name}_total") is (family.type == "counter"), sample.name
            assert all(value for value in sample.labels.values()), sample
    # Base units only, and spelt out.
    assert not re.search(r"_(ms|s|millis\w*|mib|kib|mb|kb|percent)(_total|_bucket)?[ {]", text)
    # No series twice: Prometheus refuses the whole page.
    series = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))


def test_histograms_are_cumulative_and_end_with_infinity() -> None:
    status = busy()
    key = {"queue": "tensors", "class": "interactive", "replica": "r1"}
    buckets = samples_of(status, "pimoe_queue_wait_seconds_bucket", **key)
    assert buckets == sorted(buckets)
    assert buckets[0] == 1
    assert buckets[-2:] == [2, 3]
    assert samples_of(status, "pimoe_queue_wait_seconds_bucket", le="+Inf", **key) == [3]
    assert samples_of(status, "pimoe_queue_wait_seconds_count", **key) == [3]
    assert samples_of(status, "pimoe_queue_wait_seconds_sum", **key) == [pytest.approx(100.3005)]
    assert samples_of(status, "pimoe_batch_tokens_bucket", le="16", replica="r1") == [1]
    assert samples_of(status, "pimoe_batch_tokens_sum", replica="r1") == [70_005]


def test_queues_are_told_apart_by_kind_and_class() -> None:
    status = busy()
    for name in CLASSES:
        assert len(samples_of(status, "pimoe_queue_requests", **{"class": name})) == 4
    assert samples_of(
        status, "pimoe_queue_requests", queue="tensors", replica="r1", **{"class": "interactive"}
    ) == [2]
    assert samples_of(status, "pimoe_queue_tokens", queue="tensors", replica="r1", **{"class": "interactive"}) == [
        20
    ]
    assert samples_of(status, "pimoe_queue_shed_total", queue="tensors", **{"class": "low"}) == [4, 4]
    for name, count in (("expired", 5), ("refused", 6), ("cancelled", 7)):
        key = {"queue": "generation", "class": "batch"}
        assert samples_of(status, f"pimoe_queue_{name}_total", **key) == [count, count]
        assert sum(samples_of(status, f"pimoe_queue_{name}_total")) == 2 * count
    assert samples_of(status, "pimoe_batches_closed_total", reason="full") == [1, 1]
    assert samples_of(status, "pimoe_latency_model_error_ratio", queue="tensors", replica="r2") == [0.125]
    assert samples_of(status, "pimoe_latency_model_trusted", queue="tensors", replica="r2") == [1]
    assert samples_of(status, "pimoe_latency_model_trusted", queue="generation", replica="r2") == [0]


def test_tokens_per_group_always_and_per_expert_only_where_asked_for() -> None:
    status = busy()
    assert samples_of(status, "pimoe_dispatch_rows_total", group="group-0") == [40, 40]
    assert samples_of(status, "pimoe_dispatch_rows_total", group="group-1") == [2, 2]
    assert samples_of(status, "pimoe_expert_tokens_total") == []
    assert samples_of(status, "pimoe_expert_imbalance_ratio", replica="r1") == [pytest.approx(20 * 4 / 42)]
    status = busy(per_expert=True)
    assert [samples_of(status, "pimoe_expert_tokens_total", expert=str(e), replica="r1") for e in range(4)] == [
        [20],
        [20],
        [1],
        [1],
    ]


def test_the_cache_by_outcome_and_level() -> None:
    status = busy(second=True)
    gateway = status["gateways"][0]
    gateway["cache"]["second"].update(hits=2, written=3, read_bytes=4, written_bytes=5, pending=6, breaker_open=1)
    gateway["cache"]["second"]["misses"]["timeout"] = 7
    gateway["cache"]["second"]["dropped"]["full"] = 8
    gateway["cache"]["prefetch"].update(warmed=9, useful=10)
    gateway["cache"].update(bytes=11, evicted=12)
    gateway["cache"]["bypass_reasons"]["asked"] = 13
    for name, labels, value in (
        ("requests_total", {"outcome": "memory"}, 8),
        ("requests_total", {"outcome": "second"}, 9),
        ("second_lookups_total", {"outcome": "hit"}, 2),
        ("second_lookups_total", {"outcome": "timeout"}, 7),
        ("second_written_total", {}, 3),
        ("second_read_bytes_total", {}, 4),
        ("second_written_bytes_total", {}, 5),
        ("second_pending", {}, 6),
        ("second_breaker_open", {}, 1),
        ("second_dropped_total", {"reason": "full"}, 8),
        ("prefetch_total", {"event": "warmed"}, 9),
        ("prefetch_total", {"event": "useful"}, 10),
        ("bytes", {"kind": "held"}, 11),
        ("dropped_total", {"reason": "evicted"}, 12),
        ("bypassed_total", {"reason": "asked"}, 13),
    ):
        assert samples_of(status, f"pimoe_cache_{name}", replica="g1", **labels) == [value], name


def test_requests_by_route_and_status() -> None:
    status = busy()
    assert samples_of(status, "pimoe_requests_total", route="/v1/completions", status="429") == [2, 2]
    assert samples_of(status, "pimoe_request_duration_seconds_count", route="other", replica="g2") == [1]


def test_labels_come_from_fixed_sets_or_from_the_deployment() -> None:
    status = busy(second=True, per_expert=True)
    seen: dict[str, set[str]] = {}
    for family in families_of(status).values():
        for sample in family.samples:
            for label, value in sample.labels.items():
                seen.setdefault(label, set()).add(value)
    assert seen["queue"] == {"tensors", "generation"}
    assert seen["class"] == set(CLASSES)
    assert seen["group"] == {"group-0", "group-1"}
    assert seen["expert"] == {"0", "1", "2", "3"}
    assert seen["replica"] == {"r1", "r2", "g1", "g2", "group-0-r", "group-1-r"}
    assert seen.keys() == {
        *("queue", "class", "group", "expert", "replica", "route", "status"),
        *("reason", "outcome", "event", "kind", "deployment", "le"),
    }


@pytest.mark.parametrize("routers", [[], [pages.router(engine=None)], [pages.router("old", state="unknown")]])
@pytest.mark.parametrize("gateways", [[], [pages.gateway()]])
def test_a_page_of_half_an_application_is_a_page(routers: list[Any], gateways: list[Any]) -> None:
    """While it starts, for a layer model, and while a replica hangs."""
    found = families_of(pages.page(routers, gateways))
    assert "pimoe_queue_wait" not in found
    assert "pimoe_queue_wait_seconds" in found  # its type and help, at least


def test_a_gateway_without_a_second_level_beside_one_with_it() -> None:
    status = pages.page([pages.router()], [pages.gateway("a", second=True), pages.gateway("b")])
    assert len(samples_of(status, "pimoe_cache_second_pending")) == 1


def test_whatever_clients_ask_for_routes_stay_few() -> None:
    from pimoe.deployments.metrics import _route

    paths = [
        f"/v2/models/{i}/{end}" for i in range(50) for end in ("infer", "infer_many", "ready", "versions/1", i)
    ]
    paths += [f"/{i}" for i in range(50)] + ["/v1/completions", "/v1/completions/", "/health", "/metrics", "", "/"]
    assert {_route(path) for path in paths} == {
        *("/v1/completions", "/health", "/metrics", "other"),
        *("/v2/infer", "/v2/infer_many", "/v2/ready"),
    }
