"""The load tests run and report all that they claim to measure; what they measure is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "load_tests" / "isolation.py"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


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
