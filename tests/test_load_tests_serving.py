"""The serving benchmark: its servers give right answers or are named with a reason, and its tables say what was
measured. How fast anybody is is no test's business."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

FOLDER = Path(__file__).parents[1] / "load_tests"
KEYS = {"pimoe", "mosec", "litserve", "bentoml", "triton", "serve-haproxy", "serve", "starlette"}


@pytest.fixture(scope="module", autouse=True)
def load_tests_importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


def module(name: str) -> Any:
    return import_module(name)


# A whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Facts, standard output, charts."""
    folder = tmp_path_factory.mktemp("serving")
    files = ["--json", str(folder / "facts.json"), "--svg", str(folder / "charts.svg")]
    command = [sys.executable, str(FOLDER / "compare_serving.py"), "--preset", "tiny", *files]
    # As a cluster of this process may have left it: none of that is for the servers.
    environment = {**os.environ, "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_STATS_PORT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "facts.json").read_text()), done.stdout, folder / "charts.svg"


def test_every_server_is_measured_at_every_level_or_named_with_a_reason(run: Any) -> None:
    facts, text, _ = run
    assert facts["skipped"] == {}, "the tiny preset needs nothing but pimoe's own environment"
    servers = {"pimoe", "serve", "starlette"}
    assert {row["server"] for row in facts["servers"]} == servers
    rows = {(row["server"], row["connections"]): row for row in facts["closed"]}
    assert rows.keys() == {(server, connections) for server in servers for connections in (1, 8)}
    for row in rows.values():
        assert row["requests_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["errors"] == 0
        rivals = [rows[server, row["connections"]]["requests_per_s"] for server in servers - {"pimoe"}]
        assert row["ratio"] == pytest.approx(row["requests_per_s"] / max(rivals))
    for row in facts["servers"]:
        assert row["version"][0].isdigit()
        assert row["start_s"] > 0
        assert row["memory_mib"] > 50, "of an interpreter with torch"
    assert text.startswith(f"{facts['machine']['cores']} cores of ")
    assert all(len(line) <= 150 for line in text.splitlines()[1:])


def test_an_open_loop_accounts_for_every_request_and_offers_all_the_same(run: Any) -> None:
    facts, _, _ = run
    assert len(facts["open"]) == 3
    assert len({row["offered"] for row in facts["open"]}) == 1
    for row in facts["open"]:
        assert row["offered"] == row["answered"] + row["refused"] + row["late"] + row["failed"]
        assert row["failed"] == 0


def test_targets_are_judged_and_charts_drawn(run: Any) -> None:
    facts, text, charts = run
    assert facts["ceiling"]["tokens_per_s"] > 0
    p50, rate, to_default, tokens = facts["targets"]
    assert p50["reached"] == (p50["value"] <= 0.7)
    for row, least in ((rate, 1.2), (to_default, 5.0), (tokens, 0.6)):
        assert row["reached"] == (row["value"] >= least)
        assert row["target"] == f"at least {least:g}x"
        assert row["measured"].startswith(f"{row['value']:.2f}x")
    assert p50["measured"].endswith(" of @serve.batch, default; 1 of 6 rivals")
    assert rate["measured"].endswith("; 2 of 7 rivals")
    assert ("MISSED" in text) == (not all(row["reached"] for row in facts["targets"]))
    assert ElementTree.parse(charts).getroot().tag.endswith("svg")


# The layer and the servers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(module("serving_model").write_model(tmp_path_factory.mktemp("model") / "layer"))


def test_the_rivals_layer_is_the_layer(model: Path) -> None:
    """Against every expert on every token, weighted by a dense matrix."""
    from safetensors.torch import load_file

    sample = module("serving_model").Sample(model, 3)
    tensors = load_file(model / "model.safetensors")
    hidden = torch.frombuffer(bytearray(b"".join(sample.bodies)), dtype=torch.float32).reshape(-1, 512)
    scores, chosen = functional.softmax(hidden @ tensors["gate.weight"].T, -1).topk(2)
    weights = torch.zeros(len(hidden), 8).scatter(1, chosen, scores / scores.sum(-1, keepdim=True))
    wanted = torch.zeros_like(hidden)
    for expert in range(8):
        gate, up, down = (tensors[f"experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        wanted += weights[:, expert, None] * ((functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T)
    torch.testing.assert_close(torch.from_numpy(sample.answers).reshape(-1, 512), wanted, rtol=1e-4, atol=1e-4)


def test_an_answer_that_is_off_or_short_is_wrong(model: Path) -> None:
    serving_model = module("serving_model")
    sample = serving_model.Sample(model, 2)
    sample.check(1, sample.answers[1].tobytes())
    for wrong in (sample.answers[0].tobytes(), b"", sample.answers[1].tobytes()[:-4]):
        with pytest.raises(serving_model.WrongAnswerError):
            sample.check(1, wrong)


def test_rivals_that_are_not_installed_are_named_with_what_would_install_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_contenders = module("serving_contenders")
    everybody = serving_contenders.contenders("layer")
    assert {contender.key for contender in everybody} == KEYS
    monkeypatch.setattr(serving_contenders, "ENVIRONMENTS", tmp_path)
    for contender in everybody:
        if contender.package is not None:
            assert "make rivals" in (contender.missing() or ""), contender.key


def test_a_package_that_cannot_be_imported_is_named_with_the_error() -> None:
    serving_contenders = module("serving_contenders")

    @dataclass(frozen=True)
    class Broken(serving_contenders.Contender):  # type: ignore[misc, name-defined]
        @property
        def _python(self) -> Path:
            return Path(sys.executable)

    assert "no_such_package" in Broken("x", "X", "x.py", "", package="no_such_package").missing()


def test_who_is_behind_haproxy_has_the_flags_that_pimoe_has() -> None:
    from pimoe.deployments.cluster import HAPROXY_FLAGS, serve_flags

    (rival,) = (one for one in module("serving_contenders").contenders("layer") if one.key == "serve-haproxy")
    told = rival.variables(Path("model"), 1)
    assert HAPROXY_FLAGS["RAY_SERVE_HAPROXY_METRICS_ENABLED"] == "0"
    for name, value in HAPROXY_FLAGS.items():
        assert told[name] == serve_flags("folder", 10.0)[name] == value


def made_up(code: str) -> Any:
    """A contender that is a line of Python, told its port."""
    serving_contenders = module("serving_contenders")

    @dataclass(frozen=True)
    class MadeUp(serving_contenders.Contender):  # type: ignore[misc, name-defined]
        def command(self, model: Path, port: int) -> list[str]:
            return [sys.executable, "-c", code, str(port)]

    return MadeUp("made-up", "made up", "made_up.py", "")


def test_a_server_that_ends_by_itself_is_given_up_with_what_it_printed(model: Path) -> None:
    serving_process = module("serving_process")
    sample = module("serving_model").Sample(model, 1)
    contender = made_up("print('no such setting'); raise SystemExit(3)")
    with (
        pytest.raises(serving_process.StartError, match=r"ended with 3.*no such setting"),
        serving_process.running(contender, model, sample),
    ):
        pass


# Answers zeros, and has a child that ignores SIGTERM, whose number it writes down.
_WRONG = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
open(NOTE, "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200); self.send_header("Content-Length", "8192"); self.end_headers()
        self.wfile.write(bytes(8192))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_with_wrong_numbers_is_refused_and_nothing_of_it_stays(model: Path, tmp_path: Path) -> None:
    serving_process, serving_model = module("serving_process"), module("serving_model")
    note = tmp_path / "child"
    code = _WRONG.replace("NOTE", repr(str(note)))
    sample = serving_model.Sample(model, 1)
    with (
        pytest.raises(serving_model.WrongAnswerError, match="off by"),
        serving_process.running(made_up(code), model, sample),
    ):
        pass
    assert serving_process._born(int(note.read_text())) is None


_PLAIN = _WRONG.replace("signal.signal(15, 1); ", "")


def test_a_server_ends_at_sigterm_although_the_script_ignores_it(model: Path, tmp_path: Path) -> None:
    serving_process, serving_model = module("serving_process"), module("serving_model")
    code = _PLAIN.replace("NOTE", repr(str(tmp_path / "child")))
    sample = serving_model.Sample(model, 1)
    sample.answers[:] = 0
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with serving_process.running(made_up(code), model, sample) as server:
            ignored = Path(f"/proc/{server.pid}/status").read_text().partition("SigIgn:")[2].split()[0]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not int(ignored, 16) >> (signal.SIGTERM - 1) & 1


# The tables ------------------------------------------------------------------------------------------------------


def closed_row(server: str, connections: int, requests_per_s: float, p50_ms: float, **more: Any) -> dict[str, Any]:
    row = {
        "server": server,
        "title": server,
        "is_ours": server == "pimoe",
        "is_batching": True,
        "connections": connections,
        "requests_per_s": requests_per_s,
        "p50_ms": p50_ms,
        "p99_ms": 2 * p50_ms,
        "errors": 0,
        "ratio": None,
        "rounds": [requests_per_s * 0.9, requests_per_s],
        "p50_rounds_ms": [p50_ms, p50_ms * 1.1],
    }
    return {**row, **more}


def line_up(*alone: str) -> Any:
    return module("compare_serving").line_up(False, alone)


def targets_of(rows: list[dict[str, Any]], *alone: str, levels: Any = (1, 128), **skipped: str) -> Any:
    return module("serving_targets").target_rows(line_up(*alone), rows, levels, 8000, skipped)


def test_targets_compare_with_the_best_rival_and_alone_with_the_best_batching_one() -> None:
    rows = [
        closed_row("pimoe", 1, 200, 5.0),
        closed_row("starlette", 1, 300, 3.0, is_batching=False),
        closed_row("mosec", 1, 100, 10.0),
        closed_row("pimoe", 128, 1100, 20.0, ratio=1.1),
        closed_row("serve", 128, 200, 90.0),
        closed_row("mosec", 128, 1000, 30.0, rounds=[900, 1100]),
    ]
    values = {row["what"]: (row["measured"], row["reached"]) for row in targets_of(rows)}
    assert values == {
        "p50 at 1 connection, to the best batching rival": ("0.50x (0.50 to 0.50) of mosec; 1 of 6 rivals", True),
        "requests/s at 128 connections, to the best rival": (
            "1.10x (1.00 to 1.10) of mosec; 2 of 7 rivals",
            False,
        ),
        "requests/s at 128 connections, to @serve.batch default": ("5.50x (5.50 to 5.50)", True),
        "tokens/s, to the plain torch forward with all cores": ("0.55x (0.49 to 0.55)", False),
    }


def test_alone_the_better_of_a_rivals_set_ups_is_judged_and_every_set_up_is_counted() -> None:
    rows = [
        closed_row("pimoe", 1, 200, 5.0, p50_rounds_ms=[4.0, 5.0, 6.0]),
        closed_row("mosec", 1, 100, 10.0),
        closed_row("mosec-1x2", 1, 160, 6.0, p50_rounds_ms=[5.0, 8.0]),
    ]
    p50, _ = targets_of(rows, "mosec", "litserve", levels=(1,))
    assert p50["measured"] == "0.83x (0.62 to 0.80) of mosec-1x2; 2 of 8 rivals"
    assert (p50["reached"], p50["rival"]) == (False, "mosec-1x2")


def test_a_promise_is_missed_where_pimoe_failed_and_says_why() -> None:
    rivals = [closed_row("mosec", count, 100, 10.0) for count in (1, 128)]
    everywhere = targets_of(rivals, **{"pimoe, 2 expert groups": "failed: StartError: no answer"})
    assert len(everywhere) == 4
    for row in everywhere:
        assert (row["reached"], row["value"]) == (False, None)
        assert row["measured"] == "pimoe failed: StartError: no answer"
    assert [row["target"] for row in everywhere] == [
        "at most 0.7x",
        "at least 1.2x",
        "at least 5x",
        "at least 0.6x",
    ]
    at_128 = {"pimoe, 2 expert groups at 128 connections": "failed: 20 of 1,000 requests failed"}
    p50, rate, default, tokens = targets_of([*rivals, closed_row("pimoe", 1, 1800, 5.0)], **at_128)
    assert p50["reached"]
    assert tokens["reached"]
    for row in (rate, default):
        assert (row["reached"], row["measured"]) == (False, "pimoe failed: 20 of 1,000 requests failed")


def test_a_promise_without_a_measured_rival_is_not_judged() -> None:
    rows = [closed_row("pimoe", count, 2000, 5.0) for count in (1, 128)]
    p50, rate, default, tokens = targets_of(rows, **{"@serve.batch, default": "failed: it fell over"})
    assert tokens["reached"]
    for row, why in ((p50, "no rival was"), (rate, "no rival was"), (default, "failed: it fell over")):
        assert (row["reached"], row["measured"]) == (None, f"not measured: {why}")
    assert all(row["reached"] is None for row in targets_of([closed_row("mosec", 1, 100, 10.0)]))
    table = module("report").target_table([p50, tokens])
    assert [line.split()[-1] for line in table.splitlines()[3:]] == ["judged", "reached"]


def test_who_is_set_up_for_one_connection_has_one_worker_with_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    compare_serving = module("compare_serving")
    monkeypatch.setattr(compare_serving, "cores", lambda: 4)
    everybody = line_up("mosec", "triton")
    alone = [(one.key, one.title, one.rival, one.workers, one.threads) for one in everybody if one.is_alone]
    assert alone == [
        ("mosec-1x4", "mosec 1x4", "mosec", 1, 4),
        ("triton-1x4", "Triton (pytriton) 1x4", "triton", 1, 4),
    ]
    assert {one.key for one in everybody if not one.is_alone} == KEYS
    every_way = compare_serving.line_up(True, ("mosec",))
    assert not any(one.is_alone for one in every_way), "both ways are measured at every number of connections"
    assert len(every_way) == 1 + 2 * (len(KEYS) - 1)
    monkeypatch.setattr(compare_serving, "cores", lambda: 1)
    assert {one.key for one in line_up("mosec")} == KEYS, "one worker with one core is what is measured anyway"


def test_who_is_set_up_for_one_connection_is_measured_there_only_and_in_the_first_rounds(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_rounds, serving_process = module("serving_rounds"), module("serving_process")
    asked: list[tuple[str, int]] = []

    @contextmanager
    def running(contender: Any, *_: Any) -> Iterator[Any]:
        yield serving_process.Server(contender, len(contender.key), 0, 1.0)

    def closed_loop(target: Any, connections: int, seconds: float) -> Any:
        if seconds:
            asked.append((keys[int(target.url.split(":")[2].split("/")[0])], connections))
        return load(100)

    for name, fake in (("running", running), ("closed_loop", closed_loop), ("until_idle", lambda *_: None)):
        monkeypatch.setattr(serving_rounds, name, fake)
    monkeypatch.setattr(serving_rounds, "run", lambda work: "an open loop")
    everybody = [one for one in line_up("mosec") if one.rival in ("pimoe", "mosec", "triton")]
    keys = {len(one.key): one.key for one in everybody if one.key != "pimoe"} | {5: "pimoe or mosec"}
    preset = serving_rounds.Preset(connections=(1, 32), closed_s=1, warm_s=0, ceiling_tokens=1, ceiling_times=1)
    found = serving_rounds.measure(everybody, model, module("serving_model").Sample(model, 1), preset, [])
    (alone,) = (one.key for one in everybody if one.is_alone)
    assert [each for each in asked if each[0] == alone] == [(alone, 1)] * 2
    assert sorted(each[1] for each in asked if each[0] == "triton") == [1] * 3 + [32] * 3
    assert len(found["triton"].open) == 3
    assert not found[alone].open


def open_row(server: str, rate: float, offered: int, answered: int) -> dict[str, Any]:
    return {
        **{"server": server, "title": server, "is_ours": server == "pimoe", "requests_per_s": rate},
        **{"offered": offered, "answered": answered, "refused": 0, "late": offered - answered, "failed": 0},
        **{"p50_ms": 20.0, "p99_ms": 40.0, "lag_p99_ms": 7.5},
    }


def test_an_open_loop_shows_the_generators_lag_and_charts_only_what_was_answered() -> None:
    serving_tables = module("serving_tables")
    closed = [closed_row("pimoe", 1, 200, 5.0, is_alone=False), closed_row("mosec", 1, 200, 5.0, is_alone=False)]
    opened = [open_row("pimoe", 100, 300, 300), open_row("mosec", 100, 300, 250)]
    table = serving_tables._open_table(opened, 3.0)
    assert "one sample of 3 s for each rate" in table
    assert all(line.endswith("40.0 ms   7.5 ms") for line in table.splitlines()[-2:])
    drawn = serving_tables.charts({"closed": closed, "open": opened})
    nothing_open = serving_tables.charts({"closed": closed, "open": opened[1:]})
    assert drawn.count("mosec") == nothing_open.count("mosec"), "it has no point among p99s"
    assert "97%" in drawn
    assert "97%" not in nothing_open


def test_without_rounds_before_the_last_the_missing_open_loop_is_named() -> None:
    serving_rounds, compare_serving = module("serving_rounds"), module("compare_serving")
    found = {"pimoe": serving_rounds.Measured()}
    (told,) = compare_serving.notes([], found, serving_rounds.Preset(rounds=1))
    assert told.startswith("No open loop")
    found["pimoe"].open[10.0] = "an open loop"
    assert not any("open" in told for told in compare_serving.notes([], found, serving_rounds.Preset()))
    alone = [one for one in line_up("mosec") if one.is_alone]
    assert "2 of 3 rounds" in compare_serving.notes(alone, found, serving_rounds.Preset())[0]


def test_where_pimoe_is_worse_is_said() -> None:
    worse = module("serving_tables").worse
    rows = [closed_row("pimoe", 32, 1000, 20.0), closed_row("mosec", 32, 1500, 21.0)]
    (line,) = worse(rows, [])
    assert "requests/s at 32 connections" in line
    assert "mosec is 1.50 times" in line
    assert "nowhere" in worse([closed_row("pimoe", 32, 1000, 20.0), closed_row("mosec", 32, 900, 21.0)], [])[0]
    assert worse([closed_row("mosec", 32, 900, 21.0)], []) == ["pimoe was not measured."]


def load(requests: int, **errors: int) -> Any:
    return module("wrk").Load(requests, 1.0, 1e3, 2e3, 3e3, 4e3, errors)


def test_a_server_that_was_given_up_is_in_no_table() -> None:
    serving_rounds, serving_tables = module("serving_rounds"), module("serving_tables")
    contenders = module("serving_contenders").contenders("layer")
    found = {contender.key: serving_rounds.Measured() for contender in contenders}
    for key in ("mosec", "pimoe"):
        found[key] = serving_rounds.Measured([1.0], [2**20], {32: [load(100)]})
    found["serve"] = serving_rounds.Measured([1.0], [2**20], {32: [load(900)]}, failed="it fell over")
    assert {row["server"] for row in serving_tables.closed_rows(contenders, found)} == {"pimoe", "mosec"}
    assert serving_rounds.best_rival(contenders, found) == 100.0
    assert serving_tables.failures(contenders, found) == {"@serve.batch, default": "failed: it fell over"}


def test_a_level_at_which_a_server_failed_has_a_reason_and_no_rate() -> None:
    serving_rounds, serving_tables = module("serving_rounds"), module("serving_tables")
    contenders = module("serving_contenders").contenders("layer")
    found = {contender.key: serving_rounds.Measured() for contender in contenders}
    loads = {1: [load(50), load(60)], 32: [load(0), load(900)]}
    found["mosec"] = serving_rounds.Measured([1.0], [2**20], loads, faults={32: "answered nothing in 1.0 s"})
    (row,) = serving_tables.closed_rows(contenders, found)
    assert (row["server"], row["connections"], row["requests_per_s"]) == ("mosec", 1, 55.0)
    assert serving_rounds.best_rival(contenders, found) == 60.0
    assert serving_tables.failures(contenders, found) == {
        "mosec at 32 connections": "failed: answered nothing in 1.0 s"
    }


def test_a_load_without_answers_or_with_many_errors_has_a_fault() -> None:
    assert load(1000, status=5, read=5).fault(0.01) is None
    assert load(0).fault(0.01) == "answered nothing in 1.0 s"
    assert load(40, status=40, read=2).fault(0.5) == "answered nothing in 1.0 s (status 40, read 2)"
    assert load(990, status=10, timeout=10).fault(0.01) == "20 of 1,000 requests failed (status 10, timeout 10)"


async def test_what_a_load_left_behind_is_waited_for_and_a_wrong_answer_after_it_is_refused(model: Path) -> None:
    serving_rounds, serving_model = module("serving_rounds"), module("serving_model")
    sample = serving_model.Sample(model, 1)
    right = sample.answers[0].tobytes()
    answers = [(503, right), (200, right), (200, bytes(8192))]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(8192)
        status, body = answers.pop(0)
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 8192\r\n\r\n".encode() + body)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        server = module("serving_process").Server(made_up(""), port, 0, 1.0)
        await asyncio.to_thread(serving_rounds.until_idle, server, sample)
        assert len(answers) == 1, "asked again until it was well"
        with pytest.raises(serving_model.WrongAnswerError, match="off by"):
            await asyncio.to_thread(serving_rounds.until_idle, server, sample)
