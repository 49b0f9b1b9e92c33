"""What the gateway's replicas answer before Serve sees it, and what they leave to Serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_gateway import HIDDEN, FakeGateway
from pimoe.deployments import direct
from pimoe.deployments.api import create_app
from pimoe.deployments.app import ingress_environment
from pimoe.deployments.local_settings import local_settings
from pimoe.deployments.metrics import GatewayMetrics

SEEN_BY_SERVE = 299


@pytest.fixture(autouse=True)
def nothing_served() -> Iterator[None]:
    yield
    direct._served.clear()


async def serve(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": SEEN_BY_SERVE, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def status(method: str, path: str, body: bytes = b"", root_path: str = "", kind: str = "http") -> int:
    (middleware,) = direct.middlewares()
    app = middleware.cls(serve, *middleware.args, **middleware.kwargs)
    seen: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        seen.extend([message["status"]] if "status" in message else [])

    headers = [(b"inference-header-content-length", b"0")]
    scope = {"type": kind, "method": method, "path": path, "headers": headers, "root_path": root_path}
    await app(scope, receive, send)
    return seen[0]


def serving() -> GatewayMetrics:
    metrics = GatewayMetrics()
    direct.serve_directly(create_app(FakeGateway()), metrics)
    return metrics


async def test_what_the_gateway_knows_is_answered_and_counted_once() -> None:
    metrics = serving()
    assert await status("GET", "/v2/health/live") == 200
    assert await status("POST", "/v2/models/echo/infer", bytes(4 * HIDDEN)) == 200
    assert await status("POST", "/v2/models/other/infer", bytes(4 * HIDDEN)) == 404
    assert await status("DELETE", "/v1/completions") == 405
    assert sorted(map(tuple, metrics.snapshot()["statuses"])) == [
        ("/v1/completions", 405, 1),
        ("/v2/infer", 200, 1),
        ("/v2/infer", 404, 1),
        ("/v2/live", 200, 1),
    ]


@pytest.mark.parametrize(
    "path", ["/-/healthz", "/-/routes", "/unknown", "/v2/models/infer", "/mounted/v2/health/live"]
)
async def test_all_else_is_left_to_serve(path: str) -> None:
    metrics = serving()
    assert await status("GET", path) == SEEN_BY_SERVE
    assert not metrics.snapshot()["statuses"]


async def test_a_gateway_below_a_prefix_and_other_protocols_are_left_to_serve() -> None:
    serving()
    assert await status("GET", "/v2/health/live", root_path="/v2") == SEEN_BY_SERVE
    assert await status("GET", "/v2/health/live", kind="websocket") == SEEN_BY_SERVE


async def test_without_a_gateway_all_is_left_to_serve() -> None:
    assert await status("GET", "/v2/health/live") == SEEN_BY_SERVE


@pytest.mark.parametrize("scales", [False, True])
def test_a_gateway_that_scales_by_itself_is_served_by_serve(scales: bool) -> None:
    autoscaling = {"min_replicas": 1, "max_replicas": 2}
    overrides = {"gateway": {"autoscaling": autoscaling}} if scales else {}
    environment = ingress_environment(local_settings(None, 2, overrides=overrides).gateway)
    assert (environment.get("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH") is None) is scales
    assert environment["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"
