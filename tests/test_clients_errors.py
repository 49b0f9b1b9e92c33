"""What every answer that is no success becomes."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pimoe.clients import (
    ERRORS_BY_CODE,
    ConnectionFailed,
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTensorError,
    ModelNotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PimoeClientError,
    ProtocolError,
    RequestCancelledError,
    UnavailableError,
)
from pimoe.clients.errors import Origin, error_from_answer, error_from_object
from pimoe.runtime import errors as server

TABLE = {
    "internal_error": PimoeClientError,
    "invalid_request": InvalidRequestError,
    "model_not_found": ModelNotFoundError,
    "invalid_tensor": InvalidTensorError,
    "context_length_exceeded": ContextLengthError,
    "payload_too_large": PayloadTooLargeError,
    "overloaded": OverloadedError,
    "deadline_exceeded": DeadlineExceededError,
    "request_cancelled": RequestCancelledError,
    "unavailable": UnavailableError,
    "connection_failed": ConnectionFailed,
    "protocol_error": ProtocolError,
}
RETRYABLE = {"overloaded", "unavailable", "connection_failed"}


def test_the_tree_is_the_table() -> None:
    assert ERRORS_BY_CODE == TABLE


def test_codes_and_kinships_are_those_of_the_server() -> None:
    for code, kind in server.ERRORS_BY_CODE.items():
        mirrored = ERRORS_BY_CODE.get(code)
        if mirrored not in (None, PimoeClientError):
            parents: list[Any] = [mirrored.__mro__[1], kind.__mro__[1]]
            assert parents[0].code == parents[1].code


@pytest.mark.parametrize(("code", "kind"), TABLE.items())
@pytest.mark.parametrize("shape", ["openai", "problem", "item"])
def test_every_code_in_every_shape(code: str, kind: type[PimoeClientError], shape: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "openai": {"error": {"message": "why", "type": "t", "param": "p", "code": code}},
        "problem": {
            "type": "about:blank",
            "title": "T",
            "status": 400,
            "detail": "why",
            "code": code,
            "param": "p",
        },
        "item": {"code": code, "message": "why", "param": "p"},
    }
    origin = Origin(418, 1.5, "r1")
    if shape == "item":
        error = error_from_object(bodies[shape], origin)
    else:
        error = error_from_answer("GET /", origin, json.dumps(bodies[shape]).encode())
    assert type(error) is kind
    assert (error.code, error.message, error.param) == (code, "why", "p")
    assert (error.status, error.retry_after_s, error.request_id) == (418, 1.5, "r1")
    assert error.retryable == (code in RETRYABLE)


def test_an_unknown_code_stays_readable() -> None:
    error = error_from_object({"code": "link_closed", "message": "m", "status": 503, "retry_after_s": 2.0})
    assert type(error) is PimoeClientError
    assert (error.code, error.status, error.retry_after_s) == ("link_closed", 503, 2.0)
    assert error.retryable, "its status says that it may pass"
    assert not error_from_object({"code": "new_code"}).retryable


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, InvalidRequestError, "invalid_request"),
        (401, PimoeClientError, "unauthenticated"),
        (404, PimoeClientError, "not_found"),
        (413, PayloadTooLargeError, "payload_too_large"),
        (429, OverloadedError, "overloaded"),
        (500, PimoeClientError, "internal_error"),
        (502, UnavailableError, "unavailable"),
        (503, UnavailableError, "unavailable"),
        (504, DeadlineExceededError, "deadline_exceeded"),
    ],
)
@pytest.mark.parametrize(
    "body", [b"", b"<html>No server</html>", b"[1]", b"\xff\xfe", b'{"other": 1}', b'{"error": {}}']
)
def test_answers_of_a_proxy(status: int, kind: type[PimoeClientError], code: str, body: bytes) -> None:
    error = error_from_answer("GET /x", Origin(status), body)
    assert type(error) is kind
    assert error.code == code
    assert "GET /x was answered with" in error.message


def test_openai_error_without_a_code_keeps_its_message() -> None:
    error = error_from_answer("POST /", Origin(429), b'{"error": {"message": "slow down", "code": null}}')
    assert isinstance(error, OverloadedError)
    assert error.message == "slow down"


@pytest.mark.parametrize("kind", TABLE.values())
def test_errors_survive_pickle(kind: type[PimoeClientError]) -> None:
    error = kind("m", "other_code", 503, "p", 2.5, "r")
    error.add_note("operation 3 of 8")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == str(error) == "m (other_code, HTTP 503, request r)"
    assert kind("m").code == kind.code
