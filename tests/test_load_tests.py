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
    return run_tiny("mixed_prompts.py")


def test_the_machine_is_named(facts: dict[str, Any]) -> None:
    assert facts["machine"]["cores"] > 0
    assert facts["machine"]["cpu"]
    assert {"pimoe", "torch", "ray"} <= facts["machine"]["versions"].keys()


def test_mixed_prompts_are_measured_served_whole_alone_and_by_transformers(facts: dict[str, Any]) -> None:
    mixed = ("served", "served, whole prompts", "transformers")
    rows = {(row["way"], row["prompts"]): row for row in facts["mixed_prompts"]}
    assert rows.keys() == {(way, kind) for way in mixed for kind in ("short", "long")} | {
        ("served, short only", "short")
    }
    for row in rows.values():
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert 0 <= row["itl_p50_ms"] <= row["itl_p99_ms"]
        assert row["ratio"] == pytest.approx(row["ttft_p99_ms"] / row["ttft_p50_ms"])
    for kind in ("short", "long"):
        assert len({rows[way, kind]["requests"] for way in mixed}) == 1, "all ways meet the same requests"
    totals = {row["way"]: row for row in facts["mixed_totals"]}
    assert totals.keys() == {*mixed, "served, short only"}
    assert all(row["output_tokens_per_s"] > 0 and row["prompt_tokens_per_s"] > 0 for row in totals.values())
    assert all(0 <= row["beside_long"] <= 1 for row in totals.values())
    assert totals["served, short only"]["beside_long"] == 0
    engine = totals["served"]["engine"]
    assert engine["steps"] > 0
    assert engine["prefill_tokens"] >= 16 * 16, "of sixteen prompts of at least sixteen tokens"
    assert 0 < totals["served"]["peaks"]["kv_blocks.held"] <= totals["served"]["peaks"]["kv_blocks.total"]
    assert any("p99 is" in line for line in facts["mixed_summary"])


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


@pytest.fixture(scope="module")
def switches() -> dict[str, Any]:
    return run_tiny("engine_switches.py")


def test_batch_invariance_costs_something_and_is_proved(switches: dict[str, Any]) -> None:
    rows = {(row["phase"], row["sequences"], row["way"]): row for row in switches["invariance"]}
    cases = {("decode", 1), ("decode", 4), ("prefill", 2)}
    assert rows.keys() == {(*case, way) for case in cases for way in ("off", "on")}
    assert all(row["tokens_per_s"] > 0 and row["ratio"] > 0 for row in rows.values())
    off, on = switches["proofs"]
    assert (off["way"], on["way"]) == ("off", "on")
    assert on["requests"] == 6
    assert on["tokens_differ"] == on["logprobs_differ"] == on["first_tokens_differ"] == 0


def test_micro_batches_are_compared_over_fast_and_slow_links(switches: dict[str, Any]) -> None:
    rows = {(row["link"], row["sequences"], row["way"]): row for row in switches["micro_batches"]}
    cases = {("local", 1), ("local", 4), ("slow", 4), ("elsewhere", 4)}
    assert rows.keys() == {(*case, way) for case in cases for way in ("never", "always", "auto")}
    assert all(row["ratio"] == 1 for (_, _, way), row in rows.items() if way == "never")
    decided = {(row["link"], row["sequences"]): row for row in switches["decided"]}
    assert decided.keys() == cases
    # Twice a prompt and nine steps that decode; the last ones have no more than one sequence to cut in two.
    assert all(row["single"] + row["double"] >= 20 for row in decided.values())
    assert not decided["local", 1]["double"], "one sequence is no two batches"
    # 4 layers, 2 ms each: asyncio never wakes early.
    assert decided["slow", 4]["link_ms"] > 7
    assert decided["elsewhere", 4]["link_ms"] > 7


def test_prefix_reuse_saves_tokens_only_where_they_are_shared_and_known(switches: dict[str, Any]) -> None:
    computed = {(row["prompts"], row["way"]): row["prefilled_tokens"] for row in switches["reuse"]}
    assert computed == {
        ("shared, one first", "off"): 4 * 80,
        ("shared, one first", "on"): 80 + 3 * 16,
        ("shared, at once", "off"): 4 * 80,
        ("shared, at once", "on"): 80 + 3 * 16,
        ("nothing shared", "off"): 4 * 80,
        ("nothing shared", "on"): 4 * 80,
    }
    assert all(row["first_token_p50_ms"] > 0 and row["seconds"] > 0 for row in switches["reuse"])


def test_every_prefill_budget_is_measured_and_what_is_worse_is_told(switches: dict[str, Any]) -> None:
    rows = {row["way"]: row for row in switches["budgets"]}
    assert rows.keys() == {"32", "128", "no prompts"}
    for row in rows.values():
        assert 0 < row["between_p50_ms"] <= row["between_p99_ms"], row
        assert (row["prompt_tokens_per_s"] > 0) == (row["way"] != "no prompts"), row
    assert any("batch_invariant on: every answer is the same to the bit" in line for line in switches["summary"])
    assert any("auto loses more than 3%" in line for line in switches["summary"])
