"""The load tests run and report all that they claim to measure; what they measure is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"


def run_tiny(script: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / script), "--preset", "tiny", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return run_tiny("isolation.py")


def test_the_machine_is_named(facts: dict[str, Any]) -> None:
    assert facts["machine"]["cores"] > 0
    assert facts["machine"]["cpu"]
    assert {"pimoe", "torch", "ray"} <= facts["machine"]["versions"].keys()


def test_every_dispatch_is_measured_over_links_and_handles(facts: dict[str, Any]) -> None:
    rows = {(row["kind"], row["size"], row["way"]): row for row in facts["dispatch"]}
    echo = {("echo", size, way) for size in (2**10, 2**14, 2**17, 2**20) for way in ("link", "handle")}
    experts = {("experts", size, way) for size in (1, 32) for way in ("in-process", "link", "handle")}
    assert rows.keys() == echo | experts
    assert all(0 < row["p50_us"] <= row["p95_us"] for row in rows.values())
    for (kind, size, way), row in rows.items():
        assert row["ratio"] == pytest.approx(row["p50_us"] / rows[kind, size, "link"]["p50_us"]), (kind, size, way)


def test_generation_is_measured_in_process_in_processes_and_served(facts: dict[str, Any]) -> None:
    rows = {(row["sequences"], row["way"]): row for row in facts["generation"]}
    local = ("in-process, 1 group, 1 thread", "in-process, 2 groups, 1 thread")
    apart = ("2 group processes, 1 thread", "served over HTTP, 2 groups")
    assert rows.keys() == {(count, way) for count in (1, 4) for way in (*local, *apart)}
    assert all(row["tokens_per_s"] > 0 and row["first_token_p50_ms"] > 0 for row in rows.values())
    for (count, _), row in rows.items():
        limit = max(rows[count, way]["tokens_per_s"] for way in local)
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / limit)


def test_overload_accounts_for_every_request_under_both_orders() -> None:
    facts = run_tiny("overload.py")
    assert facts["capacity"]["tokens_per_s"] > 0
    assert [phase["order"] for phase in facts["orders"]] == ["priority", "fifo"]
    offered = []
    for phase in facts["orders"]:
        assert [row["name"] for row in phase["rows"]] == ["interactive", "default", "batch"]
        for row in phase["rows"]:
            assert row["offered"] == row["in_time"] + row["refused"] + row["late"] + row["failed"]
            assert row["failed"] == 0
        offered.append([row["offered"] for row in phase["rows"]])
        assert facts["goodput"][phase["order"]] == sum(row["in_time"] for row in phase["rows"])
    assert offered[0] == offered[1], "both orders meet the same arrivals"
    interactive, _, batch = facts["orders"][0]["rows"]
    assert interactive["in_time"] / interactive["offered"] > batch["in_time"] / batch["offered"]


def test_cache_policies_are_compared_on_every_trace_and_stay_in_their_bounds() -> None:
    facts = run_tiny("cache_policies.py")
    ours = {"fifo", "lru", "sieve", "w-tinylfu"}
    rows = [row for row in facts["cache_policies"] if row["ours"]]
    traces = {(row["trace"], row["share"]) for row in facts["cache_policies"]}
    assert len({trace for trace, _ in traces}) == 4
    assert {(row["trace"], row["share"], row["contender"]) for row in rows} == {
        (*trace, policy) for trace in traces for policy in ours
    }
    assert all(0 < row["hit_ratio"] < 1 for row in rows)
    assert all(row["peak"] <= 1 for row in rows)
    assert set(facts["skipped"]) <= {"cachetools", "cachebox", "moka_py"}
