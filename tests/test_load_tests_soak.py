"""The soak finds what drifts, and only that; and its mixed work does what it says."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"
MINUTES = [5.0 * index for index in range(240)]  # seconds, one sample every five


@pytest.fixture
def drift(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import soak_drift

    return soak_drift


def noise(scale: float) -> list[float]:
    generator = random.Random(0)
    return [generator.gauss(0, scale) for _ in MINUTES]


def test_a_leak_below_the_noise_of_one_sample_is_found(drift: Any) -> None:
    leak = [300e6 + 20e6 * at / MINUTES[-1] + wild for at, wild in zip(MINUTES, noise(10e6), strict=True)]
    found = drift.trend("router", "rss_bytes", MINUTES, leak)
    assert found.drifts
    assert found.growth == pytest.approx(20e6, rel=0.3)


def test_noise_and_wild_samples_are_no_drift(drift: Any) -> None:
    values = [300e6 + wild for wild in noise(5e6)]
    values[-10:] = [900e6] * 10  # something happened at the end
    assert not drift.trend("router", "rss_bytes", MINUTES, values).drifts


def test_a_leaked_descriptor_now_and_then_is_found(drift: Any) -> None:
    values = [80.0 + index // 20 for index in range(len(MINUTES))]
    assert drift.trend("gateway", "descriptors", MINUTES, values).drifts


def test_what_shrinks_does_not_drift(drift: Any) -> None:
    values = [50.0 - 20 * at / MINUTES[-1] for at in MINUTES]
    assert not drift.trend("generate", "p99_ms", MINUTES, values).drifts


def test_too_few_samples_say_nothing(drift: Any) -> None:
    assert not drift.trend("generate", "p50_ms", [0.0, 1.0, 2.0], [1.0, 100.0, 1000.0]).drifts


def test_the_slope_is_that_of_a_line_with_a_quarter_of_wild_samples(drift: Any) -> None:
    times = [float(index) for index in range(40)]
    values = [3.0 * at + (1e6 if index % 4 == 0 else 0.0) for index, at in enumerate(times)]
    assert drift.theil_sen(times, values) == pytest.approx(3.0, abs=0.5)


def test_a_short_soak_accounts_for_every_request_and_process(tmp_path: Path) -> None:
    chart = tmp_path / "soak.svg"
    command = [sys.executable, str(FOLDER / "soak.py"), "--preset", "tiny", "--json", "-", "--svg", str(chart)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert not facts["judged"]
    assert facts["offered_per_s"] == pytest.approx(0.8 * facts["capacity_per_s"])
    counts = {row.pop("kind"): row for row in facts["outcomes"]}
    assert counts.keys() == {"generate", "tensor", "cached", "leave", "bad"}
    assert sum(row["failed"] for row in counts.values()) == 0
    assert all(row["done"] > 0 for row in counts.values())
    assert facts["cache"]["hits"] > 0, "what is popular is asked for again"
    trends = {(row["subject"], row["quantity"]) for row in facts["trends"]}
    for process in ("router 0", "gateway 0", "group-0", "group-1", "haproxy", "load generator"):
        assert {(process, each) for each in ("rss_bytes", "descriptors", "threads")} <= trends, process
    assert ("generate", "p99_ms") in trends
    (target,) = facts["targets"]
    assert target["reached"] is None, "too short to judge"
    ElementTree.fromstring(chart.read_text())


def test_only_what_is_pimoes_and_only_a_long_run_speak_against_it(drift: Any) -> None:
    import soak
    from process_usage import Usage
    from soak_work import Outcome

    used = Usage(1, 1, 1, 1, 1)
    record = soak.Record(
        0.0,
        [Outcome("bad", 0, 0, "failed: WrongAnswerError: 200"), Outcome("tensor", 0, 0, "refused")],
        {1: [(0, used), (5, used)], 2: [(0, used)], 3: [(0, used)]},
        {1: "router 0", 2: "group-0", 3: "haproxy", 4: "gateway 0"},
    )
    grew = (1.0, 9.0, 9.0, 4.0, True)
    trends = [drift.Trend(*each, *grew) for each in (("haproxy", "descriptors"), ("raylet", "threads"))]
    gone = ["group-0 ended, or was replaced", "gateway 0 ended, or was replaced"]
    failed = "1 requests failed: WrongAnswerError: 200"
    assert soak._verdicts(trends, record, {1, 2, 4}, soak.PRESETS["tiny"]) == [*gone, failed]
    drifts = "haproxy: descriptors drifts"
    assert soak._verdicts(trends, record, {1, 2, 4}, soak.PRESETS["default"]) == [*gone, failed, drifts]
