"""The table of errors, what errors let out, and the plain routes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
import pytest
from fake_gateway import FakeGateway, ask
from pimoe.deployments.api import ApiSettings
from pimoe.deployments.api.errors import (
    TABLE,
    MethodNotAllowedError,
    NotFoundError,
    UnsupportedMediaTypeError,
    public,
    render,
    retry_after_s,
)
from pimoe.runtime import errors
from pimoe.runtime.errors import ERRORS_BY_CODE, PimoeError

COMPLETION = orjson.dumps({"model": "echo", "prompt": "hi"})

# Faults of ours: no caller can do anything about them.
INTERNAL = {"invalid_configuration", "invalid_checkpoint", "unknown_model_family", "insufficient_resources"}


def test_every_code_is_in_the_table_or_internal() -> None:
    edge = {kind.code for kind in (NotFoundError, MethodNotAllowedError, UnsupportedMediaTypeError)}
    assert set(TABLE) | INTERNAL == set(ERRORS_BY_CODE) | edge
    assert not set(TABLE) & INTERNAL


@pytest.mark.parametrize("code", sorted(ERRORS_BY_CODE))
@pytest.mark.parametrize("path", ["/v1/completions", "/health"])
async def test_every_error_has_its_status_and_shape(code: str, path: str) -> None:
    error = ERRORS_BY_CODE[code]("what happened", "field")
    if path == "/health":
        reply = await ask(FakeGateway(model_error=error), "GET", path)
    else:
        reply = await ask(FakeGateway(error=error), "POST", path, COMPLETION)
    expected = "internal_error" if code in INTERNAL else code
    assert reply.status == TABLE[expected].status
    body = orjson.loads(reply.body)
    found = body["error"] if path.startswith("/v1") else body
    assert found["code"] == expected
    hidden = expected == "internal_error" or expected.startswith("link")
    assert (b"what happened" in reply.body) is not hidden
    assert ("retry-after" in reply.headers) == (reply.status in (429, 503))


@pytest.mark.parametrize(("wait_s", "seconds", "ms"), [(None, 1, 1000), (0.2, 1, 200), (2.1, 3, 2100)])
def test_retry_after_is_rounded_up(wait_s: float | None, seconds: int, ms: int) -> None:
    headers = dict(render(errors.OverloadedError("full", None, wait_s), openai=True)[3])
    assert headers[b"retry-after"] == str(seconds).encode()
    assert headers[b"retry-after-ms"] == str(ms).encode()


@pytest.mark.parametrize("given", [float("nan"), float("inf"), -1.0])
def test_a_senseless_wait_becomes_the_default(given: float) -> None:
    assert retry_after_s(errors.UnavailableError("x", None, given)) == 1.0


def test_an_unknown_code_is_internal() -> None:
    class NewError(PimoeError):
        code = "brand_new"

    assert public(NewError("secret"), "id-1").code == "internal_error"
    assert "id-1" in public(ValueError("secret"), "id-1").message


@pytest.mark.parametrize("kind", [RuntimeError, PimoeError, errors.CheckpointError])
async def test_faults_go_to_the_log_only(kind: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    error = kind("secret")
    with caplog.at_level(logging.ERROR):
        headers = {"x-request-id": "abc"}
        reply = await ask(FakeGateway(error=error), "POST", "/v1/completions", COMPLETION, headers)
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert b"abc" in reply.body
    [record] = [record for record in caplog.records if record.exc_info]
    assert "abc" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


async def test_errors_of_the_caller_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await ask(FakeGateway(), "POST", "/v1/completions", b"{")
        await ask(FakeGateway(error=errors.OverloadedError("full")), "POST", "/v1/completions", COMPLETION)
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a-1_b", True),
        ("x" * 128, True),
        ("~!{}", True),
        ("x" * 129, False),
        ("two words", False),
        ("", False),
        ("tab\t", False),
        ("\xe9", False),
        ("\x7f", False),
    ],
)
async def test_request_id_is_echoed_if_sane(given: str, kept: bool) -> None:
    for path in ("/health", "/nowhere"):
        reply = await ask(FakeGateway(), "GET", path, headers={"x-request-id": given})
        assert (reply.headers["x-request-id"] == given) is kept
        assert reply.headers["x-request-id"]


async def test_plain_routes() -> None:
    gateway = FakeGateway()
    assert orjson.loads((await ask(gateway, "GET", "/health")).body) == {"status": "ok", "model": "echo"}
    assert orjson.loads((await ask(gateway, "GET", "/admin/status")).body) == {"model": "echo", "groups": []}
    metrics = await ask(gateway, "GET", "/metrics")
    assert metrics.body == b"pimoe_up 1\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert (await ask(gateway, "HEAD", "/health")).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 503),
        ("GET", "/v1/models", 503),
        ("GET", "/v2/models/echo", 503),
        ("POST", "/v1/completions", 503),
        ("POST", "/v2/models/echo/infer", 503),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2", 200),
        ("GET", "/metrics", 200),
    ],
)
async def test_before_a_router_is_known(method: str, path: str, status: int) -> None:
    reply = await ask(FakeGateway(info=None), method, path, b"{}")
    assert reply.status == status
    if status == 503:
        assert b'"unavailable"' in reply.body
        assert reply.headers["retry-after-ms"] == "2500"


async def test_a_cancellation_from_behind_is_an_error_not_silence() -> None:
    reply = await ask(FakeGateway(error=asyncio.CancelledError()), "POST", "/v1/completions", COMPLETION)
    assert reply.status == 500
    body = orjson.dumps({"model": "echo", "prompt": ["a", "b"]})
    gateway = FakeGateway(fail_after=1, error=asyncio.CancelledError())
    reply = await ask(gateway, "POST", "/v1/completions", body)
    assert reply.status == 500


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_body_bytes": 0},
        {"default_timeout_s": -1.0},
        {"default_timeout_s": float("nan")},
        {"default_timeout_s": 10.0, "max_timeout_s": 5.0},
        {"max_timeout_s": 1e6},
        {"max_choices": True},
        {"max_logprobs": "20"},
    ],
)
def test_settings_are_checked(wrong: Any) -> None:
    with pytest.raises(errors.ConfigurationError):
        ApiSettings(**wrong)
