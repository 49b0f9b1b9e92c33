"""What a request may say of itself on every route: priority, OpenAI's service tier, and the time it may take."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from fake_gateway import HIDDEN, FakeGateway, Reply, ask, served
from pimoe.clients import AsyncClient, Client, InvalidRequestError
from pimoe.deployments.api import ApiSettings, create_app
from pimoe.deployments.api.options import check_one_tenant, from_headers
from pimoe.runtime.batching import NAMED_PRIORITIES, SERVICE_TIERS
from pimoe.runtime.errors import InvalidRequestError as RefusedError
from ray.serve._private.http_util import parse_request_timeout_header

PRIORITY = "x-pimoe-priority"
TIMEOUT = "x-pimoe-timeout"
SERVE_TIMEOUT = "x-request-timeout-seconds"

ZEROS = np.zeros((1, HIDDEN), np.float32)
TENSOR = {"name": "hidden_states", "shape": [1, HIDDEN], "datatype": "FP32"}

V1 = ["completion", "chat", "stream"]
V2 = ["json", "binary", "msgpack", "many", "many msgpack"]


async def send(
    gateway: FakeGateway, route: str, options: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> Reply:
    """One request on a route: options in the body under `/v1`, in its `parameters` under `/v2`."""
    options, headers = options or {}, dict(headers or {})
    if route in V1:
        content: dict[str, Any] = {"model": "echo", "stream": route == "stream", **options}
        if route == "chat":
            content["messages"] = [{"role": "user", "content": "a"}]
        else:
            content["prompt"] = "a"
        path = "/v1/chat/completions" if route == "chat" else "/v1/completions"
        return await ask(gateway, "POST", path, orjson.dumps(content), headers)
    packed = "msgpack" in route
    data: Any = ZEROS.tobytes() if packed else ZEROS.tolist()
    tensor: dict[str, Any] = {**TENSOR, "data": data}
    if route == "binary":
        tensor = {**TENSOR, "parameters": {"binary_data_size": ZEROS.nbytes}}
    content = {"inputs": [tensor], "parameters": options}
    if "many" in route:
        content = {"requests": [content]}
    body = msgpack.packb(content) if packed else orjson.dumps(content)
    if packed:
        headers["content-type"] = "application/msgpack"
    if route == "binary":
        headers["inference-header-content-length"] = str(len(body))
        body += ZEROS.tobytes()
    path = "/v2/models/echo/" + ("infer_many" if "many" in route else "infer")
    return await ask(gateway, "POST", path, body, headers)


async def reached(
    route: str, options: dict[str, Any] | None = None, headers: dict[str, str] | None = None, **settings: float
) -> Any:
    """The one request that came through to the gateway."""
    gateway = FakeGateway(settings=ApiSettings(**settings))  # type: ignore[arg-type]
    reply = await send(gateway, route, options, headers)
    assert reply.status == 200, reply.body
    assert b'"error"' not in reply.body
    (request,) = [*gateway.generated, *gateway.inferred]
    return request


async def refused(route: str, options: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> Any:
    """The error of a request that came through to nobody: code, param and message."""
    gateway = FakeGateway()
    reply = await send(gateway, route, options, headers)
    assert gateway.generated == []
    assert gateway.inferred == []
    body = (
        msgpack.unpackb(reply.body)
        if reply.headers["content-type"].endswith("msgpack")
        else orjson.loads(reply.body)
    )
    if "responses" in body:
        assert reply.status == 200
        error = body["responses"][0]["error"]
        assert error["status"] == 400
        return error["code"], error["param"], error["message"]
    assert reply.status == 400, reply.body
    error = body["error"] if route in V1 else {**body, "message": body["detail"]}
    return error["code"], error["param"], error["message"]


# Priority --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", V1 + V2)
@pytest.mark.parametrize(
    ("given", "priority"),
    [(0, 0.0), (1, 1.0), (0.25, 0.25), ("batch", 0.0), ("default", 0.5), ("interactive", 1.0), (None, 0.5)],
)
async def test_priority_in_the_body(route: str, given: Any, priority: float) -> None:
    assert (await reached(route, {"priority": given})).priority == priority


@pytest.mark.parametrize("route", V1 + V2)
@pytest.mark.parametrize(
    ("given", "priority"),
    [("0", 0.0), ("1", 1.0), (" 0.25 ", 0.25), ("1e0", 1.0), ("batch", 0.0), (" interactive ", 1.0)],
)
async def test_priority_in_the_header_and_the_body_wins(route: str, given: str, priority: float) -> None:
    headers = {PRIORITY: given}
    assert (await reached(route, {}, headers)).priority == priority
    assert (await reached(route, {"priority": None}, headers)).priority == priority
    assert (await reached(route, {"priority": 0.75}, headers)).priority == 0.75
    assert (await reached(route, {"priority": "default"}, headers)).priority == 0.5


@pytest.mark.parametrize("route", V1 + V2)
@pytest.mark.parametrize("given", ["urgent", "Interactive", "", "low", "high", "0.5", -0.1, 1.1, 2, True, [], {}])
async def test_a_wrong_priority_is_named_with_what_would_be_right(route: str, given: Any) -> None:
    code, param, message = await refused(route, {"priority": given})
    assert code == "invalid_request"
    assert param == ("priority" if route in V1 else "parameters.priority")
    assert "from 0 to 1" in message
    if isinstance(given, str):
        assert all(name in message for name in NAMED_PRIORITIES)


@pytest.mark.parametrize("given", ["urgent", "Batch", "", "nan", "inf", "-1", "2", "0_1", "0,5", "é", "0.5 batch"])
async def test_a_wrong_priority_header_is_named(given: str) -> None:
    code, param, message = await refused("json", {}, {PRIORITY: given})
    assert (code, param) == ("invalid_request", PRIORITY)
    assert "number" in message


# Service tier ----------------------------------------------------------------------------------------------------

TIERS = {"default": 0.5, "standard": 0.5, "flex": 0.0, "priority": 1.0, "scale": 1.0}


def test_every_tier_is_tested() -> None:
    assert SERVICE_TIERS == TIERS


@pytest.mark.parametrize("route", V1)
@pytest.mark.parametrize("tier", TIERS)
async def test_service_tier_stands_between_priority_and_header(route: str, tier: str) -> None:
    body, headers = {"service_tier": tier}, {PRIORITY: "0.3"}
    assert (await reached(route, body)).priority == TIERS[tier]
    assert (await reached(route, body, headers)).priority == TIERS[tier]
    assert (await reached(route, {**body, "priority": 0.7}, headers)).priority == 0.7
    assert (await reached(route, {**body, "priority": "batch"}, headers)).priority == 0.0
    assert (await reached(route, {**body, "priority": None}, headers)).priority == TIERS[tier]


@pytest.mark.parametrize("route", V1)
@pytest.mark.parametrize("tier", ["auto", None])
async def test_a_tier_that_asks_for_nothing_changes_nothing(route: str, tier: str | None) -> None:
    assert (await reached(route, {"service_tier": tier})).priority == 0.5
    assert (await reached(route, {"service_tier": tier}, {PRIORITY: "batch"})).priority == 0.0
    assert (await reached(route, {"service_tier": tier, "priority": 0.9})).priority == 0.9


@pytest.mark.parametrize("route", V1)
@pytest.mark.parametrize("priority", [{}, {"priority": 0.5}, {"priority": "batch"}])
@pytest.mark.parametrize("tier", ["Flex", "urgent", "", 1, 0.5, True, [], {"a": 1}])
async def test_a_wrong_tier_is_named_whether_or_not_it_would_count(
    route: str, priority: dict[str, Any], tier: Any
) -> None:
    code, param, message = await refused(route, {"service_tier": tier, **priority})
    assert (code, param) == ("invalid_request", "service_tier")
    if isinstance(tier, str):
        assert all(name in message for name in ("auto", *TIERS))


@pytest.mark.parametrize("route", V2)
async def test_tensors_have_no_service_tier(route: str) -> None:
    assert (await refused(route, {"service_tier": "flex"}))[1] == "parameters.service_tier"


# Time ------------------------------------------------------------------------------------------------------------


def nearly(seconds: float) -> Any:
    """What a request has left of its time: a little is spent on the way, a slow machine spends more."""
    return pytest.approx(seconds - 10, abs=10)


@pytest.mark.parametrize("route", V1 + V2)
async def test_serves_header_bounds_every_timeout(route: str) -> None:
    bound = {SERVE_TIMEOUT: "100"}
    for options, headers, seconds in (
        ({}, {}, 100),  # the default is longer
        ({"timeout": 1000.0}, {}, 100),
        ({"timeout": 1000}, {}, 100),
        ({"timeout": 50.0}, {}, 50),
        ({}, {TIMEOUT: "1000"}, 100),
        ({}, {TIMEOUT: "50"}, 50),
        ({"timeout": 1000.0}, {TIMEOUT: "50"}, 100),  # the body wins over our header, and nothing over Serve's
        ({"timeout": None}, {TIMEOUT: "1000"}, 100),
    ):
        request = await reached(route, options, bound | headers, default_timeout_s=2000.0)
        assert request.timeout_s == nearly(seconds), (options, headers)


@pytest.mark.parametrize("route", V2)
async def test_serves_header_bounds_tritons_microseconds(route: str) -> None:
    headers = {SERVE_TIMEOUT: "100"}
    assert (await reached(route, {"timeout": 1_000_000_000}, headers)).timeout_s == nearly(100)
    assert (await reached(route, {"timeout": 50_000_000}, headers)).timeout_s == nearly(50)


@pytest.mark.parametrize("route", V1 + V2)
@pytest.mark.parametrize("given", ["0", "-0", "-1", "nan", "-inf", "inf", "", "soon", "5 s", "0x10", "1e400", "é"])
async def test_serves_header_bounds_nothing_where_it_says_nothing(route: str, given: str) -> None:
    assert (await reached(route, {}, {SERVE_TIMEOUT: given})).timeout_s == nearly(60)
    assert (await reached(route, {"timeout": 300.0}, {SERVE_TIMEOUT: given})).timeout_s == nearly(300)


@pytest.mark.parametrize(
    "given",
    ["1", " 2.5 ", "1e1", "1_0", "+3", "0.001", "0", "-0.0", "-1", "nan", "inf", "-inf", "x", "", "5,0", "0x5"],
)
def test_serves_header_is_read_as_serve_reads_it(given: str) -> None:
    headers = {SERVE_TIMEOUT.encode(): given.encode()}
    serves = parse_request_timeout_header(headers, None)
    assert from_headers(headers, ApiSettings()).longest_s == (math.inf if serves is None else serves)


@pytest.mark.parametrize("route", V1 + V2)
async def test_serves_header_ends_what_takes_longer(route: str) -> None:
    gateway = FakeGateway(settings=ApiSettings(deadline_grace_s=0.01), hang=True)
    reply = await send(gateway, route, {"timeout": 1000.0}, {SERVE_TIMEOUT: "0.02"})
    if "many" in route:
        assert b"deadline_exceeded" in reply.body
    else:
        assert reply.status == 504
    assert gateway.cancelled == len([*gateway.generated, *gateway.inferred])


async def test_each_operation_of_many_is_bounded() -> None:
    requests = [
        {"inputs": [{**TENSOR, "data": ZEROS.tolist()}], "parameters": parameters}
        for parameters in ({}, {"timeout": 1000.0}, {"timeout": 30.0, "priority": "batch"})
    ]
    gateway = FakeGateway()
    headers = {SERVE_TIMEOUT: "50", PRIORITY: "interactive"}
    reply = await ask(gateway, "POST", "/v2/models/echo/infer_many", orjson.dumps({"requests": requests}), headers)
    assert reply.status == 200
    assert [request.timeout_s for request in gateway.inferred] == [nearly(50), nearly(50), nearly(30)]
    assert [request.priority for request in gateway.inferred] == [1.0, 1.0, 0.0]


# Tenant ----------------------------------------------------------------------------------------------------------


def two_tenants(app: Any, names: tuple[str, str], header: bytes = b"x-pimoe-tenant") -> Any:
    """The application behind a proxy that adds a header where it should have replaced it."""

    async def proxied(scope: Any, receive: Any, send: Any) -> None:
        tenants = [(header, name.encode()) for name in names]
        await app({**scope, "headers": [*scope["headers"], *tenants]}, receive, send)

    return proxied


@pytest.mark.parametrize("route", V1 + V2)
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("a", "a"), ("", "a"), ("a", "")])
async def test_two_tenants_are_refused(
    monkeypatch: pytest.MonkeyPatch, route: str, names: tuple[str, str]
) -> None:
    monkeypatch.setattr("fake_gateway.create_app", lambda gateway: two_tenants(create_app(gateway), names))
    gateway = FakeGateway()
    reply = await send(gateway, route)
    assert reply.status == 400
    assert b"more than once" in reply.body
    assert [*gateway.generated, *gateway.inferred] == []


def test_names_of_headers_have_no_case() -> None:
    with pytest.raises(RefusedError, match="more than once"):
        check_one_tenant([(b"x-pimoe-tenant", b"a"), (b"X-Pimoe-Tenant", b"b")])
    check_one_tenant([(b"x-pimoe-tenant", b"a"), (b"x-other", b"b"), (b"x-other", b"b")])


@pytest.mark.parametrize("route", V1 + V2)
async def test_other_headers_may_be_there_twice(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    def twice(gateway: FakeGateway) -> Any:
        return two_tenants(create_app(gateway), ("a", "b"), b"x-other")

    monkeypatch.setattr("fake_gateway.create_app", twice)
    assert (await reached(route, {}, {"x-pimoe-tenant": "acme"})).tenant == "acme"


# Our client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "priority"), [*NAMED_PRIORITIES.items(), (0.25, 0.25), (0, 0.0), (1, 1.0), (None, 0.5)]
)
def test_our_client_takes_names_and_numbers(given: float | str | None, priority: float) -> None:
    gateway = FakeGateway()
    with served(gateway) as address, Client(f"http://{address}") as client:
        client.generate("a", priority=given)
        for _ in client.stream("a", priority=given):
            pass
        client.infer(ZEROS, priority=given)
        client.infer_many([ZEROS], priority=given)
    assert [request.priority for request in (*gateway.generated, *gateway.inferred)] == [priority] * 4


async def test_our_client_is_told_of_a_wrong_name() -> None:
    with served(FakeGateway()) as address:
        async with AsyncClient(f"http://{address}") as client:
            with pytest.raises(InvalidRequestError, match="interactive"):
                await client.infer(ZEROS, priority="urgent")
            with pytest.raises(InvalidRequestError, match="interactive"):
                await client.generate("a", priority="urgent")
