"""The flush of the cache over HTTP: what it reaches, and every wrong way to ask for it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from fake_gateway import FakeGateway, ask
from pimoe.deployments.api import ApiSettings
from pimoe.runtime.errors import UnavailableError

FLUSH = "/admin/cache/flush"


@pytest.mark.parametrize(
    ("body", "scope"),
    [
        ({"scope": "all"}, (None, None)),
        ({"scope": "all", "model": None, "tenant": None}, (None, None)),
        ({"scope": "model", "model": "echo"}, ("echo", None)),
        ({"scope": "tenant", "tenant": "acme"}, (None, "acme")),
        ({"scope": "tenant", "tenant": ""}, (None, "")),
        ({"scope": "tenant", "tenant": "acme", "model": "echo"}, ("echo", "acme")),
        ({"model": "echo"}, ("echo", None)),
        ({"tenant": "acme"}, (None, "acme")),
        ({"tenant": ""}, (None, "")),
        ({"scope": None, "tenant": "acme", "model": "echo"}, ("echo", "acme")),
    ],
)
async def test_a_flush_names_what_it_reaches(body: dict[str, Any], scope: tuple[str | None, str | None]) -> None:
    gateway = FakeGateway()
    reply = await ask(gateway, "POST", FLUSH, orjson.dumps(body))
    assert reply.status == 200
    assert orjson.loads(reply.body) == {"flushed": 3, "gateways": 2, "second_level": {"deleted": 5}}
    assert gateway.flushes == [scope]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "scope"),
        ({"tenant": None, "model": None}, "scope"),
        ({"tenant": "a b"}, "tenant"),
        ({"model": 1}, "model"),
        ({"scope": "everything"}, "scope"),
        ({"scope": 1}, "scope"),
        ({"scope": "model"}, "model"),
        ({"scope": "tenant"}, "tenant"),
        ({"scope": "tenant", "tenant": 1}, "tenant"),
        ({"scope": "tenant", "tenant": "a b"}, "tenant"),
        ({"scope": "tenant", "tenant": "é"}, "tenant"),
        ({"scope": "tenant", "tenant": "a" * 129}, "tenant"),
        ({"scope": "tenant", "model": "echo"}, "tenant"),
        ({"scope": "all", "model": "echo"}, "model"),
        ({"scope": "all", "tenant": "acme"}, "tenant"),
        ({"scope": "model", "model": "echo", "tenant": "acme"}, "tenant"),
        ({"scope": "all", "force": True}, "force"),
        ([], None),
    ],
)
async def test_a_flush_that_is_not_clear_is_refused(body: Any, param: str | None) -> None:
    gateway = FakeGateway()
    reply = await ask(gateway, "POST", FLUSH, orjson.dumps(body))
    error = orjson.loads(reply.body)
    assert (reply.status, error["code"], error["param"]) == (400, "invalid_request", param)
    assert gateway.flushes == []


@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_a_flush_of_nothing_is_shown_what_would_be_right(body: bytes) -> None:
    gateway = FakeGateway()
    reply = await ask(gateway, "POST", FLUSH, body)
    error = orjson.loads(reply.body)
    assert (reply.status, error["param"], gateway.flushes) == (400, "scope", [])
    assert all(
        shape in error["detail"] for shape in ('{"scope": "all"}', '{"model": "NAME"}', '{"tenant": "NAME"}')
    )


async def test_a_flush_that_is_too_large_is_called_so() -> None:
    gateway = FakeGateway(settings=ApiSettings(max_body_bytes=100))
    assert (await ask(gateway, "POST", FLUSH, b" " * 101)).status == 413
    assert (await ask(gateway, "POST", FLUSH, b"x", {"content-encoding": "gzip"})).status == 415
    assert gateway.flushes == []


async def test_a_flush_of_another_model_is_refused() -> None:
    gateway = FakeGateway()
    body = orjson.dumps({"scope": "model", "model": "ecko"})
    reply = await ask(gateway, "POST", FLUSH, body)
    assert (reply.status, orjson.loads(reply.body)["code"]) == (404, "model_not_found")
    gateway.info = None  # no router: nothing is known to compare it with, and nothing keeps it from a flush
    assert (await ask(gateway, "POST", FLUSH, body)).status == 200
    assert gateway.flushes == [("ecko", None)]


async def test_a_flush_that_did_not_reach_all_is_an_error() -> None:
    gateway = FakeGateway(error=UnavailableError("not every gateway answered the flush; ask again", None, 0.5))
    reply = await ask(gateway, "POST", FLUSH, b'{"scope": "all"}')
    assert (reply.status, orjson.loads(reply.body)["code"]) == (503, "unavailable")
    assert reply.headers["retry-after"] == "1"


async def test_a_flush_is_a_post() -> None:
    reply = await ask(FakeGateway(), "GET", FLUSH)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
