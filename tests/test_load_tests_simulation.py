"""The simulation of batching: it reports all that it claims, what it reports adds up, its parts do as they say.
How well anybody does is no test's business."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pimoe.runtime.batching import NAMED_PRIORITIES, BatchLimits, QueueLimits
from pimoe.runtime.batching.policy import overtaking_bound_s

FOLDER = Path(__file__).parents[1] / "load_tests"
POLICIES = ("pimoe", "@serve.batch", "Triton", "BentoML")
CLASSES = ("all", "interactive", "default", "batch")
SHARES = ("in_time", "late", "expired", "refused")


def simulate(*options: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "simulate_batching.py"), "--preset", "tiny", "--json", "-", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def plot_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plot") / "plot.svg"


@pytest.fixture(scope="module")
def facts(plot_file: Path) -> dict[str, Any]:
    return simulate("--plot", str(plot_file))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; the others that it imports are its attributes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("simulate_batching")


def small(script: Any, **queue: Any) -> Any:
    """A service whose bounds are met within seconds."""
    limits = QueueLimits(max_tokens=20_000, target_delay_s=0.3, standing_s=0.2, **queue)
    return script.Service(batching=BatchLimits(max_batch_tokens=512, max_patience_s=0.4), queue=limits)


def overload(script: Any, service: Any, seconds: float = 6.0) -> Any:
    loads, capacity = script.traces.mix(2.0), service.capacity_tokens_per_s
    return script.traces.generate(script.traces.HEAVY_TAILS, loads, capacity, seconds, max_tokens=512, seed=3)


# What it reports


def test_every_policy_meets_every_trace(facts: dict[str, Any]) -> None:
    traces = {run["trace"] for run in facts["runs"]}
    assert {"light 0.2x", "Poisson 0.8x", "bursts 0.8x", "heavy tails 0.8x", "overload 2x"} <= traces
    runs = {(run["trace"], run["policy"]) for run in facts["runs"]}
    assert runs == {(trace, policy) for trace in traces for policy in POLICIES}
    classes = {(row["trace"], row["policy"], row["class_name"]) for row in facts["classes"]}
    assert classes == {(*run, name) for run in runs for name in CLASSES}
    assert {(run["trace"], run["policy"]) for run in facts["curve_runs"]} == {
        (load, policy) for load in ("0.5", "2.0") for policy in POLICIES
    }


def test_every_arrival_has_one_outcome_under_every_policy(facts: dict[str, Any]) -> None:
    offered: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for row in [*facts["classes"], *facts["curves"]]:
        assert sum(row[share] for share in SHARES) == pytest.approx(1.0)
        assert all(0 <= row[share] <= 1 for share in (*SHARES, "in_time_tokens"))
        assert sum(row[share] * row["offered"] for share in SHARES) == pytest.approx(row["offered"])
        offered.setdefault((row["trace"], row["class_name"]), set()).add((row["offered"], row["offered_tokens"]))
    assert all(len(each) == 1 for each in offered.values()), "policies met different traces"


def test_waits_and_batches_are_possible(facts: dict[str, Any]) -> None:
    most = facts["service"]["batching"]["max_batch_tokens"]
    for run in [*facts["runs"], *facts["curve_runs"]]:
        assert 0 < run["mean_batch_tokens"] <= most
        assert 0 < run["utilisation"] <= 1.0 + 1e-6
        assert run["goodput"] > 0
    for row in facts["classes"]:
        assert row["overtaken_s"] >= 0
        if row["wait_p99_s"] is None:
            assert row["in_time"] == row["late"] == 0
        else:
            assert 0 <= row["wait_p50_s"] <= row["wait_p99_s"]


def test_nobody_who_asks_for_priority_is_overtaken_beyond_the_bound(facts: dict[str, Any]) -> None:
    batching, queue = BatchLimits(**facts["service"]["batching"]), QueueLimits(**facts["service"]["queue"])
    for row in facts["classes"]:
        if row["policy"] == "pimoe" and row["class_name"] != "all":
            priority = NAMED_PRIORITIES[row["class_name"]]
            assert row["overtaken_s"] <= overtaking_bound_s(priority, batching, queue.target_delay_s) + 1e-6


def test_the_comparison_is_computed_for_every_rival(facts: dict[str, Any]) -> None:
    compared = facts["comparisons"]
    assert {(each["trace"], each["rival"]) for each in compared} == {
        (run["trace"], run["policy"]) for run in facts["runs"] if run["policy"] != "pimoe"
    }
    assert {each["verdict"] for each in compared} <= {"wins", "even", "loses"}
    rows = {(row["trace"], row["policy"], row["class_name"]): row for row in facts["classes"]}
    for each in compared:
        if each["respect"] == "interactive in time":
            ours, theirs = (
                rows[each["trace"], policy, "interactive"]["in_time"] for policy in ("pimoe", each["rival"])
            )
            assert each["verdict"] == (
                "even" if abs(ours - theirs) <= 0.02 else "wins" if ours > theirs else "loses"
            )


def test_the_plot_is_a_chart_of_all_policies(facts: dict[str, Any], plot_file: Path) -> None:
    root = ElementTree.parse(plot_file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {*POLICIES, "Goodput", "offered load / capacity"} <= set(texts)
    lines = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(root.findall("{http://www.w3.org/2000/svg}g")) == 4
    assert all(lines.count(policy) >= 3 for policy in POLICIES)
    assert "nan" not in plot_file.read_text()


def test_a_recorded_trace_is_replayed_instead(tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    lines = [
        {"time_s": 0.01 * index, "tokens": 40, "priority": index % 2, "timeout_s": 1.0, "user": "of no interest"}
        for index in range(50)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = simulate("--trace", str(path), "--load", "0.1", "--plot", str(tmp_path / "plot.svg"))
    assert {row["trace"] for row in found["classes"]} == {"recorded.jsonl"}
    assert [row["offered"] for row in found["classes"] if row["class_name"] == "all"] == [50] * len(POLICIES)
    assert found["curves"] == []
    assert found["runs"][0]["load"] == pytest.approx(0.1, rel=0.01)
    ElementTree.parse(tmp_path / "plot.svg")


# Its parts


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_once_and_the_same_way_again(script: Any, policy: str) -> None:
    service = small(script)
    arrivals = overload(script, service, seconds=2.0)
    first, again = (script.replay(policy, service, arrivals) for _ in range(2))
    assert [request.arrival for request in first.requests] == arrivals
    assert first.requests == again.requests
    assert first.batches == again.batches
    for request in first.requests:
        assert request.left_s >= request.arrival.time_s
        assert (request.outcome == "in time") <= math.isfinite(request.began_s)
        assert (request.outcome in ("expired", "refused")) == math.isinf(request.began_s)
    assert all(batch.tokens <= service.batching.max_batch_tokens for batch in first.batches)
    computed = sum(request.arrival.tokens for request in first.requests if math.isfinite(request.began_s))
    in_batches = sum(batch.tokens for batch in first.batches)
    assert in_batches == computed or (policy == "BentoML" and in_batches < computed)  # dropped after a first part


def test_under_long_overload_ours_keeps_the_overtaking_bound_and_strict_priority_does_not(script: Any) -> None:
    service = small(script)
    arrivals = overload(script, service)
    worst = {}
    for policy in ("pimoe", "Triton"):
        played = script.replay(policy, service, arrivals)
        worst[policy] = {r.class_name: r.overtaken_s for r in script.class_results("overload", policy, played)}
    target_s = max(service.queue.target_delay_s, 8 * 2 * service.full_batch_s)
    for name, priority in NAMED_PRIORITIES.items():
        assert worst["pimoe"][name] <= overtaking_bound_s(priority, service.batching, target_s)
    assert worst["Triton"]["batch"] > overtaking_bound_s(0.0, service.batching, target_s)


def test_serve_batch_is_first_come_first_served_but_for_what_did_not_fit(script: Any) -> None:
    service = small(script)
    arrivals = [script.Arrival(0.001 * index, 100, index % 2, 60.0) for index in range(60)]
    requests = script.replay("@serve.batch", service, arrivals).requests
    assert all(request.outcome == "in time" for request in requests)
    behind = [b.left_s < a.left_s for a, b in pairwise(requests)]
    assert sum(behind) <= len(requests) * 100 // 512 + 1


def test_triton_serves_the_urgent_first(script: Any) -> None:
    service = small(script)
    arrivals = [script.Arrival(0.001 * index, 100, index % 2, 60.0) for index in range(60)]
    requests = script.replay("Triton", service, arrivals).requests
    late_urgent = max(r.left_s for r in requests if r.arrival.priority == 1)
    in_between = [r for r in requests if r.arrival.priority == 0 and 0.07 < r.left_s < late_urgent]
    assert in_between == []


def test_bentoml_drops_what_would_be_late_and_splits_what_does_not_fit(script: Any) -> None:
    service = small(script)
    arrivals = [script.Arrival(0.002 * index, 300, 1.0, 1.0) for index in range(300)]
    played = script.replay("BentoML", service, arrivals)
    assert {request.outcome for request in played.requests} >= {"in time", "expired"}
    assert max(batch.tokens for batch in played.batches) == 512


def test_virtual_time_is_not_waited_for(script: Any) -> None:
    async def nap() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        before = loop.time()
        await asyncio.sleep(24 * 3600)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        return before, loop.time()

    before, after = import_module("batching_replay").run_virtually(nap())
    assert after - before == pytest.approx(25 * 3600, abs=0.001)

    async def stuck() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing is left to happen"):
        import_module("batching_replay").run_virtually(stuck())


def test_traces_have_the_load_they_are_asked_for(script: Any) -> None:
    traces = script.traces
    for shape in (traces.POISSON, traces.BURSTS, traces.HEAVY_TAILS):
        made = traces.generate(shape, traces.mix(0.8), 10_000.0, 20.0, 512)
        assert made == traces.generate(shape, traces.mix(0.8), 10_000.0, 20.0, 512)
        assert made == sorted(made, key=lambda arrival: arrival.time_s)
        assert sum(arrival.tokens for arrival in made) / 200_000 == pytest.approx(0.8, rel=0.02)
        assert 0 <= made[0].time_s <= made[-1].time_s <= 20.0
        interactive = sum(arrival.tokens for arrival in made if arrival.priority == 1.0)
        assert interactive / 200_000 == pytest.approx(0.24, rel=0.05)


def test_a_trace_is_read_as_it_was_written(script: Any, tmp_path: Path) -> None:
    made = script.traces.generate(script.traces.BURSTS, script.traces.mix(0.5), 1000.0, 5.0, 512)
    script.traces.write(made, tmp_path / "trace.jsonl")
    assert script.traces.read(tmp_path / "trace.jsonl") == made


def test_larger_requests_come_in_pieces(script: Any) -> None:
    pieces = list(
        script.traces.split([script.Arrival(1.0, 1100, 0.5, 3.0), script.Arrival(2.0, 512, 0.5, 3.0)], 512)
    )
    assert [(piece.time_s, piece.tokens) for piece in pieces] == [(1.0, 512), (1.0, 512), (1.0, 76), (2.0, 512)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Expecting"),
        ('{"time_s": 1.0}', "tokens"),
        ('{"time_s": 1.0, "tokens": 0, "priority": 0.5, "timeout_s": 1.0}', "at least 1"),
        ('{"time_s": 1.0, "tokens": 1, "priority": 2, "timeout_s": 1.0}', "between 0 and 1"),
        ('{"time_s": 1.0, "tokens": 1, "priority": 0.5, "timeout_s": 0}', "above 0"),
        ('{"time_s": 0.0, "tokens": 1, "priority": 0.5, "timeout_s": 1.0}', "before the line above"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(script: Any, tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time_s": 0.5, "tokens": 1, "priority": 0.5, "timeout_s": 1.0}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"trace\.jsonl, line 3.*{problem}"):
        script.traces.read(path)
