"""Start-up is split into all of its phases, and memory said of every process, over replicas that do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "footprint.py"), "--preset", "tiny", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_phases_add_up_to_the_first_answer(facts: dict[str, Any]) -> None:
    rows = facts["start_up"]
    phases = ["command", "Ray", "controller", "replicas, proxies", "links", "first answer"]
    assert [row["phase"] for row in rows] == phases
    assert all(row["seconds"] >= 0 for row in rows)
    assert sum(row["seconds"] for row in rows) == pytest.approx(rows[-1]["until_s"])


def test_memory_is_said_over_replicas_that_do_nothing(facts: dict[str, Any]) -> None:
    rows = {row["process"]: row for row in facts["memory"]}
    assert {"expert group", "router", "gateway", "empty replica", "replica with torch", "raylet"} <= rows.keys()
    assert rows["expert group"]["processes"] == 2
    for row in rows.values():
        assert row["uss_bytes"] <= row["pss_bytes"] <= row["rss_bytes"], row
    group, empty = rows["expert group"], rows["empty replica"]
    assert group["weights_bytes"] > 0
    assert group["over_empty_bytes"] == group["uss_bytes"] - group["weights_bytes"] - empty["uss_bytes"]
    assert rows["gateway"]["over_torch_bytes"] is None, "it has none"
    assert facts["command"]["embedded"]["all_pss_bytes"] > facts["command"]["embedded"]["command_pss_bytes"] > 0


def test_a_gateway_holds_no_torch_and_a_group_little_besides(facts: dict[str, Any]) -> None:
    """Bytes, not seconds: the same wherever it runs, give or take."""
    rows = {row["process"]: row for row in facts["memory"]}
    torch_bytes = rows["replica with torch"]["uss_bytes"] - rows["empty replica"]["uss_bytes"]
    assert rows["gateway"]["over_empty_bytes"] < torch_bytes / 2
    assert rows["expert group"]["over_torch_bytes"] < torch_bytes / 2


def test_a_process_is_read_and_one_that_ended_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import process_usage

    used = process_usage.usage(os.getpid())
    assert used is not None
    assert 0 < used.uss_bytes <= used.pss_bytes <= used.rss_bytes
    assert used.descriptors >= 3
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert process_usage.usage(ended.pid) is None
    assert process_usage.name_of(ended.pid) is None
