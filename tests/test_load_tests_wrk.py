"""The closed-loop generators: wrk, and what takes its place, ask alike and count alike."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"
BODIES = [bytes(range(256)) * 20, b"\0wrong"]
HEADERS = {"X-Own": 'q"uo\\te', "Content-Type": "application/octet-stream"}


class Answering(BaseHTTPRequestHandler):
    """Keeps what it is asked; answers 500 to what ends with "wrong"."""

    protocol_version = "HTTP/1.1"
    asked: set[tuple[str, str, str | None, bytes]]
    names_length = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.add((self.command, self.path, self.headers.get("x-own"), body))
        self.send_response(500 if body.endswith(b"wrong") else 200)
        if self.names_length:
            self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None: ...


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None: ...  # wrk leaves in the middle of answers


@contextmanager
def answering(names_length: bool = True) -> Iterator[tuple[str, type[Answering]]]:
    handler = type("Handler", (Answering,), {"asked": set(), "names_length": names_length})
    with Quiet(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
            thread.join()


def module(name: str) -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


wrk, closed_loop = module("wrk"), module("closed_loop")


def ours(target: Any, connections: int, seconds: float) -> Any:
    return asyncio.run(closed_loop.closed_loop(target, connections, seconds))


GENERATORS = [
    pytest.param(
        wrk.run, id="wrk", marks=pytest.mark.skipif(not wrk.is_installed(), reason="wrk is not installed")
    ),
    pytest.param(ours, id="closed_loop"),
]


@pytest.mark.parametrize("generator", GENERATORS)
def test_requests_arrive_as_they_are_meant_and_errors_are_counted(generator: Any) -> None:
    with answering() as (url, handler):
        load = generator(wrk.Target(f"{url}/a?b=%20c", "POST", HEADERS, BODIES), 3, 1)
    assert handler.asked == {("POST", "/a?b=%20c", HEADERS["X-Own"], body) for body in BODIES}
    assert load.requests > 0
    assert abs(load.errors["status"] - load.requests / 2) <= 3, "every other one is wrong, in turn"
    assert load.failed == load.errors["status"]
    assert load.requests_per_s == pytest.approx((load.requests - load.errors["status"]) / load.seconds)
    assert 0 < load.p50_us <= load.p90_us <= load.p99_us <= load.max_us


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_request_may_have_no_body(generator: Any) -> None:
    with answering() as (url, handler):
        load = generator(wrk.Target(f"{url}/a"), 1, 1)
    assert handler.asked == {("GET", "/a", None, b"")}
    assert load.requests > 0
    assert not load.failed


@pytest.mark.parametrize("generator", GENERATORS)
def test_whom_nobody_can_reach_is_an_error(generator: Any) -> None:
    with answering() as (url, _):
        pass
    with pytest.raises((wrk.WrkError, OSError), match=r"127\.0\.0\.1|refused|Connect"):
        generator(wrk.Target(url), 1, 1)


def test_an_answer_without_an_end_is_an_error_and_no_endless_wait() -> None:
    with answering(names_length=False) as (url, _):
        load = asyncio.run(closed_loop.closed_loop(wrk.Target(url), 1, 0.3, timeout_s=0.1))
    assert load.requests == 0
    assert load.errors["timeout"] > 0
    assert "answered nothing" in (load.fault(0.01) or "")


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_server_that_closes_after_every_answer_is_no_error(generator: Any) -> None:
    with answering() as (url, handler):
        handler.protocol_version = "HTTP/1.0"
        load = generator(wrk.Target(url, "POST", {}, BODIES[:1]), 2, 1)
    assert load.requests > 2
    assert load.fault(0.01) is None


def test_without_wrk_the_other_generator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrk, "is_installed", lambda: False)
    with answering() as (url, _):
        assert closed_loop.measure(wrk.Target(url), 1, 0.2).generator == "closed_loop.py"
        with pytest.raises(wrk.WrkError, match="not installed"):
            wrk.run(wrk.Target(url), 1, 1)
