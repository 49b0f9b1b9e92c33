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


def test_a_descriptor_a_minute_is_found_also_where_connections_come_and_go(drift: Any) -> None:
    generator = random.Random(1)
    values = [80.0 + at // 60 + generator.randint(-3, 3) for at in MINUTES]
    assert drift.trend("gateway", "descriptors", MINUTES, values).drifts


@pytest.mark.parametrize("minute", range(1, 20))
def test_a_step_that_stays_is_no_drift_whenever_it_comes(drift: Any, minute: int) -> None:
    generator = random.Random(minute)
    values = [80.0 + 13 * (at >= 60 * minute) + generator.randint(-1, 1) for at in MINUTES]
    found = drift.trend("haproxy", "descriptors", MINUTES, values)
    assert not found.drifts
    assert found.excess < 0.9


@pytest.mark.parametrize("full_at_s", [60, 300, 600])
def test_a_pool_that_fills_and_then_stays_is_no_drift(drift: Any, full_at_s: int) -> None:
    generator = random.Random(full_at_s)
    values = [80.0 + round(20 * min(1, at / full_at_s)) + generator.randint(-1, 1) for at in MINUTES]
    assert not drift.trend("haproxy", "descriptors", MINUTES, values).drifts


def test_a_leak_that_begins_in_the_middle_is_found(drift: Any) -> None:
    values = [80.0 + max(0.0, at - 600) // 30 for at in MINUTES]
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
    assert done.stdout, done.stderr
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["against"]) == (0, []), done.stderr
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
    assert {row["what"].split(":")[0] for row in facts["targets"]} == {
        f"soak, {name}" for name in ("memory", "descriptors", "threads", "latency", "answers")
    }
    assert all(row["reached"] is None for row in facts["targets"]), "too short to judge"
    ElementTree.fromstring(chart.read_text())


@pytest.fixture
def verdict(drift: Any) -> Any:
    import soak_verdict

    return soak_verdict


def outcomes(*parts: tuple[int, str], spread_s: float = 1200.0) -> list[Any]:
    """So many of each, one part after the other."""
    from soak_work import Outcome

    ended = [how for count, how in parts for _ in range(count)]
    return [Outcome("tensor", spread_s * index / len(ended), 0.01, how) for index, how in enumerate(ended)]


def test_only_what_is_pimoes_and_only_a_long_run_speak_against_it(drift: Any, verdict: Any) -> None:
    from process_usage import Usage

    used = Usage(1, 1, 1, 1, 1)
    record = verdict.Record(
        0.0,
        outcomes((500, "done"), (1, "failed: WrongAnswerError: 200"), (500, "done")),
        {1: [(0, used), (5, used)], 2: [(0, used)], 3: [(0, used)]},
        {1: "router 0", 2: "group-0", 3: "haproxy", 4: "gateway 0"},
    )
    grew = (1.0, 9.0, 9.0, 9.0, 9.0, 4.0, 1.5, True)
    trends = [drift.Trend(*each, *grew) for each in (("haproxy", "descriptors"), ("raylet", "threads"))]
    gone = ["group-0 ended, or was replaced", "gateway 0 ended, or was replaced"]
    failed = "1 requests failed: WrongAnswerError: 200"
    assert verdict.verdicts(trends, record, {1, 2, 4}, judges=False) == [*gone, failed]
    drifts = "haproxy: descriptors drifts"
    assert verdict.verdicts(trends, record, {1, 2, 4}, judges=True) == [*gone, failed, drifts]
    rows = {row["what"].split(" (")[0]: row for row in verdict.target_rows(trends, record, {1, 2, 4}, judges=True)}
    missed = {what: row["measured"] for what, row in rows.items() if not row["reached"]}
    assert missed == {
        "soak, descriptors: growth over what is allowed": "1.50x",
        "soak, answers: requests that failed, processes that ended": "3",
    }


@pytest.mark.parametrize("ended", ["refused", "late"])
def test_an_application_that_refuses_half_from_the_fifth_minute_on_fails(verdict: Any, ended: str) -> None:
    half = [(1, "done"), (1, ended)] * 3750
    record = verdict.Record(0.0, outcomes((2500, "done"), *half))
    much, more = verdict.verdicts([], record, set(), judges=True)
    assert much.startswith("37.5% of 10,000 requests got no answer in time")
    assert more.startswith("requests without an answer in time became more, by 37.5 points")
    missed = [row["measured"] for row in verdict.target_rows([], record, set(), judges=True) if not row["reached"]]
    assert missed == ["37.50%", "37.53 points"]


def test_what_was_never_sent_counts_as_unanswered(verdict: Any) -> None:
    record = verdict.Record(0.0, outcomes((9000, "done")), dropped=[0.12 * index for index in range(1000)])
    (much,) = (line for line in verdict.verdicts([], record, set(), judges=True) if "10.0%" in line)
    assert "1,000 never sent" in much


def test_refusals_below_the_limit_that_become_more_are_found(verdict: Any) -> None:
    later = [(99, "done"), (1, "refused")] * 60
    record = verdict.Record(0.0, outcomes((12000, "done"), *later))
    (more,) = verdict.verdicts([], record, set(), judges=True)
    assert "became more" in more


def test_a_few_refusals_now_and_then_are_nothing(verdict: Any) -> None:
    random.seed(0)
    parts = [(1, "refused" if random.random() < 0.005 else "done") for _ in range(20000)]
    record = verdict.Record(0.0, outcomes(*parts))
    assert record.outcomes
    assert verdict.verdicts([], record, set(), judges=True) == []
    assert all(row["reached"] for row in verdict.target_rows([], record, set(), judges=True))
