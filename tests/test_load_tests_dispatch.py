"""The load test of dispatches: it reports all ways, sizes and groups that it claims. How fast anything is is no
test's business."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"
WAYS = {"link", "link, socket only", "link, generic call", "ZeroMQ", "actor", "handle"}
SIZES = (2**10, 2**14, 2**17, 2**20, 2**22)


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chart") / "dispatch.svg"


@pytest.fixture(scope="module")
def facts(chart: Path) -> dict[str, Any]:
    script = str(FOLDER / "dispatch.py")
    command = [sys.executable, script, "--preset", "tiny", "--json", "-", "--svg", str(chart)]
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


def test_bytes_and_tokens_are_sent_every_way(facts: dict[str, Any]) -> None:
    rows = {(row["kind"], row["size"], row["groups"], row["way"]): row for row in facts["dispatch"]}
    ways = WAYS - facts["skipped"].keys()
    echo = {("echo", *case) for case in product(SIZES, (1, 2, 4), ways)}
    experts = {("experts", size, 2, way) for size in (1, 32) for way in ("in-process", "lane", "link", "handle")}
    assert rows.keys() == echo | experts
    assert all(0 < row["p50_us"] <= row["p95_us"] for row in rows.values())
    for case, row in rows.items():
        link = rows[(*case[:3], "link")]
        assert row["ratio"] == pytest.approx(row["p50_us"] / link["p50_us"]), case
    assert set(facts["skipped"]) <= {"ZeroMQ"}


def test_the_target_is_judged_by_the_row_that_it_is_for(facts: dict[str, Any]) -> None:
    (row,) = (row for row in facts["dispatch"] if (row["size"], row["groups"], row["way"]) == (2**14, 2, "handle"))
    (target,) = facts["targets"]
    assert target["reached"] == (row["ratio"] >= 50), "by packed calls, as dispatches use them"
    assert target["measured"] == f"{row['ratio']:.1f}x"


def test_the_reference_shape_stands_beside_what_was_published(facts: dict[str, Any]) -> None:
    local, lane, link, handle, published = facts["reference"]
    assert [row["way"].split(",")[0] for row in (local, lane, link, handle)] == [
        "in-process",
        "lane",
        "link",
        "handle",
    ]
    assert (published["p50_ms"], published["p95_ms"], published["tokens_per_s"]) == (16.7, 22.4, 3784.0)
    assert published["to_in_process"] is None
    for row in (local, lane, link, handle):
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["to_in_process"] == pytest.approx(row["p50_ms"] / local["p50_ms"])
        # Routed tokens are 64 a call; the mean call lies somewhere around the median.
        assert row["tokens_per_s"] > 64 / (100 * row["p50_ms"] / 1e3)


def test_what_is_worse_is_told(facts: dict[str, Any]) -> None:
    slower = [row for row in facts["dispatch"] if row["ratio"] < 1]
    reference = [line for line in facts["worse"] if line.startswith("the reference shape")]
    assert len(facts["worse"]) == len(slower) + len(reference)


def test_the_chart_has_a_panel_for_each_number_of_groups(facts: dict[str, Any], chart: Path) -> None:
    titles = {text.text for text in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")}
    assert facts["dispatch"]
    assert {"bytes to 1 group(s)", "bytes to 2 group(s)", "bytes to 4 group(s)"} <= titles
    assert "tokens through experts" in titles


def test_large_messages_are_sent_less_often() -> None:
    preset = module("dispatch").Preset(rounds=1, link_calls=300, handle_calls=40, most_bytes=2**24)
    assert preset.calls("link", 2**10) == 300
    assert preset.calls("handle", 2**10) == 40
    assert preset.calls("link", 2**20) == 16
    assert preset.calls("handle", 2**24) == 3


def test_payloads_are_random_and_compared_byte_by_byte() -> None:
    echo = module("dispatch_echo")
    sent = echo.payload(4096)
    assert sent.nbytes == 4096
    assert len(set(sent.tolist())) > 1000
    whole = memoryview(sent.tobytes())
    for check in (echo.same_length, echo.same_bytes):
        check([whole[:100], whole[100:]], sent)
        with pytest.raises(RuntimeError, match="came back"):
            check([whole[:-1]], sent)
    other = bytearray(whole)
    other[2000] ^= 1
    echo.same_length([memoryview(other)], sent)
    with pytest.raises(RuntimeError, match="other bytes came back"):
        echo.same_bytes([memoryview(other)], sent)


class Lanes:
    """A dispatcher whose lane closes at some of its dispatches, which then go over links, as do the next two."""

    def __init__(self, *closes_at: int) -> None:
        self._closes_at, self._dispatches, self._closed, self.over_lanes = closes_at, 0, 0, 0

    def statistics(self) -> Lanes:
        return self

    async def dispatch(self) -> None:
        self._dispatches += 1
        if self._dispatches in self._closes_at:
            self._closed = 3
        self.over_lanes += self._closed == 0
        self._closed = max(0, self._closed - 1)


def test_what_went_over_links_is_no_time_of_lanes() -> None:
    timing = module("dispatch_timing")
    good, once, always = Lanes(), Lanes(20), Lanes(*range(1, 300, 10))
    assert len(asyncio.run(timing.timed_over_lanes(good, good.dispatch, 20))) == 20
    assert good.over_lanes == 1 + 2 + 20, "one to see that they are open, and a warm-up"
    assert len(asyncio.run(timing.timed_over_lanes(once, once.dispatch, 20))) == 20, "measured again"
    with pytest.raises(RuntimeError, match=r"of 22 dispatches \[\d+, \d+, \d+\] went over lanes"):
        asyncio.run(timing.timed_over_lanes(always, always.dispatch, 20))


def test_the_reference_layer_has_the_published_shape(tmp_path: Path) -> None:
    from pimoe.runtime.model.checkpoint import Checkpoint
    from pimoe.runtime.model.families import read_spec

    spec = read_spec(Checkpoint(module("dispatch_reference").write_reference(tmp_path, 16)))
    assert (spec.hidden_size, spec.experts.num_experts, spec.top_k, spec.dtype) == (2048, 8, 8, "bfloat16")
