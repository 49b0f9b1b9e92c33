"""The cache's load test: it reports all that it claims, and its parts do as they say. How fast anything is is no
test's business."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chart") / "cache.svg"


@pytest.fixture(scope="module")
def facts(chart: Path) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "cache.py"), "--preset", "tiny", "--json", "-", "--svg", str(chart)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def module(name: str) -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def test_hits_are_measured_beside_an_empty_handler_and_computing(facts: dict[str, Any]) -> None:
    rows = {(row["request"], row["connections"], row["way"]): row for row in facts["served"]}
    ways = ("hit", "empty handler", "empty handler, past Serve", "computed")
    assert rows.keys() == set(itertools.product(("completion", "tensor"), (1, 4), ways))
    for (name, count, _), row in rows.items():
        empty = rows[name, count, "empty handler"]
        assert (row["failed"], row["fault"]) == (0, None)
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["rate_to_empty"] == pytest.approx(row["requests_per_s"] / empty["requests_per_s"])
        assert row["p50_to_empty"] == pytest.approx(row["p50_us"] / empty["p50_us"])
    assert facts["gateways"] >= 1
    assert len(facts["targets"]) == 2 * 4
    for target in facts["targets"]:
        limit, measured = (float(target[key].split()[-1].rstrip("x")) for key in ("target", "measured"))
        distance = measured - limit if target["target"].startswith("at most") else limit - measured
        assert abs(distance) < 0.01 or target["reached"] == (distance < 0), target


def test_hits_are_measured_in_process(facts: dict[str, Any]) -> None:
    rows = {(row["request"], row["way"]): row for row in facts["local"]}
    assert rows.keys() == set(itertools.product(("completion", "tensor"), ("look-up", "hit", "computed")))
    assert all(row["per_s"] > 0 and 0 < row["p50_us"] <= row["p99_us"] for row in rows.values())
    assert all(row["to_computed"] == 1 for (_, way), row in rows.items() if way == "computed")


def test_hits_under_zipf_stand_beside_the_best_possible(facts: dict[str, Any]) -> None:
    (row,) = facts["zipf"]
    assert (row["policy"], row["entries"], row["distinct"]) == ("lru", 20, 200)
    assert row["hits"] + row["coalesced"] + row["misses"] == row["requests"] == 600
    assert row["hit_ratio"] == pytest.approx((row["hits"] + row["coalesced"]) / 600)
    # What is held is bounded: more hits than that are not to be had, but for those that came at the same moment.
    assert 0 < row["hits"] / 600 <= row["best"] < 1
    assert row["replayed"] <= row["best"]


def test_the_chart_has_a_panel_for_each_request_and_for_zipf(facts: dict[str, Any], chart: Path) -> None:
    titles = [text.text for text in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")]
    assert facts["zipf"]
    assert {"a completion, over HTTP", "a tensor, over HTTP", "under Zipf"} <= set(titles)


def loads(served: Any, good: dict[str, int], bad: dict[str, int] | None = None) -> dict[tuple[str, int, str], Any]:
    """One load for each way: so many requests, of which so many got a bad status, and all as fast as can be."""
    load = module("wrk").Load
    bad = bad or {}
    return {
        ("tensor", 1, way): [load(count, 1.0, 100.0, 100.0, 100.0, 100.0, {"status": bad.get(way, 0)})]
        for way, count in good.items()
    }


@pytest.mark.parametrize("way", ["hit", "empty handler"])
def test_errors_are_no_answers_however_fast_they_are(way: str) -> None:
    served = module("cache_served")
    found = loads(served, dict.fromkeys(served.WAYS, 1000), {way: 20})
    rows = [served.served_of(case, found) for case in found]
    targets = served.targets(rows)
    assert [target["reached"] for target in targets] == [False, False]
    assert all(f"{way}: 20 of 1,000 requests failed (status 20)" in target["measured"] for target in targets)
    assert any("not measured" in line and way in line for line in served.worse_lines(rows))


def test_nothing_but_errors_is_reported_too() -> None:
    served = module("cache_served")
    found = loads(served, dict.fromkeys(served.WAYS, 1000), {"empty handler": 1000})
    rows = [served.served_of(case, found) for case in found]
    assert all(row.rate_to_empty is None for row in rows)
    assert "tensor" in served.served_table(rows)


def test_an_error_in_a_thousand_is_judged() -> None:
    served = module("cache_served")
    found = loads(served, dict.fromkeys(served.WAYS, 1000), {"hit": 1})
    rows = [served.served_of(case, found) for case in found]
    assert [target["reached"] for target in served.targets(rows)] == [True, True]


def test_a_hit_stands_beside_both_empty_handlers() -> None:
    served = module("cache_served")
    found = loads(served, {**dict.fromkeys(served.WAYS, 1000), served.PAST_SERVE: 2000})
    (line,) = served.worse_lines([served.served_of(case, found) for case in found])
    assert "past Serve (p50) and gives 0.50 of its requests/s" in line


def test_every_way_is_first_at_times() -> None:
    served = module("cache_served")
    orders = [served.turns(index) for index in range(8)]
    assert {order[0] for order in orders} == set(served.WAYS)
    assert all(sorted(order) == sorted(served.WAYS) for order in orders)


def most_hits(trace: Sequence[int], entries: int) -> int:
    """By trying everything."""

    def most(position: int, kept: frozenset[int]) -> int:
        if position == len(trace):
            return 0
        key = trace[position]
        choices = (
            {kept | {key}} if len(kept | {key}) <= entries else {(kept | {key}) - {one} for one in (*kept, key)}
        )
        return (key in kept) + max(most(position + 1, after) for after in choices)

    return most(0, frozenset())


@pytest.mark.parametrize("entries", [1, 2, 3])
def test_the_best_possible_is_what_no_choice_beats(entries: int) -> None:
    best_hits, make_trace = module("cache_zipf").best_hits, module("cache_zipf").make_trace
    for start in range(0, 60, 10):
        trace = make_trace(6, 80)[start : start + 10]
        assert best_hits(trace, entries) == most_hits(trace, entries), trace


def test_a_replay_evicts_what_is_over_its_room() -> None:
    replayed_hits = module("cache_zipf").replayed_hits
    assert replayed_hits([1, 2, 1, 2, 1, 2], "lru", 2) == 4
    assert replayed_hits([1, 2, 3, 1, 2, 3], "lru", 2) == 0
    assert replayed_hits([1, 2, 3, 1, 2, 3], "lru", 3) == 3
