"""One table: error code -> HTTP status. And the two shapes an error has on the wire.

`/v1` answers with OpenAI's error object, everything else with RFC 9457 problem details, whose extra members
are `code` (ours, stable) and `error` (the message once more: `tritonclient` reads it there).

A code that is not in the table is a fault of ours: it is answered as `internal_error`, and its text, which
may name hosts, paths or prompts, goes to the log only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson

from ...runtime.errors import InvalidRequestError, LinkError, PimoeError

Headers = list[tuple[bytes, bytes]]

DEFAULT_RETRY_AFTER_S = 1.0
INTERNAL = "internal_error"


@dataclass(frozen=True, slots=True)
class Row:
    """How one code is answered; `retry` adds `Retry-After`."""

    status: int
    title: str
    openai_type: str
    retry: bool = False


_BAD_REQUEST = Row(400, "Bad Request", "invalid_request_error")
_LINK = Row(503, "Service Unavailable", "server_error", retry=True)

TABLE: dict[str, Row] = {
    "invalid_request": _BAD_REQUEST,
    "invalid_tensor": _BAD_REQUEST,
    "context_length_exceeded": _BAD_REQUEST,
    "model_not_found": Row(404, "Not Found", "invalid_request_error"),
    "not_found": Row(404, "Not Found", "invalid_request_error"),
    "method_not_allowed": Row(405, "Method Not Allowed", "invalid_request_error"),
    "payload_too_large": Row(413, "Content Too Large", "invalid_request_error"),
    "unsupported_media_type": Row(415, "Unsupported Media Type", "invalid_request_error"),
    "overloaded": Row(429, "Too Many Requests", "rate_limit_error", retry=True),
    "request_cancelled": Row(499, "Client Closed Request", "request_cancelled"),
    INTERNAL: Row(500, "Internal Server Error", "server_error"),
    "unavailable": Row(503, "Service Unavailable", "server_error", retry=True),
    "link_error": _LINK,
    "link_closed": _LINK,
    "link_protocol_error": _LINK,
    "link_authentication_failed": _LINK,
    "deadline_exceeded": Row(504, "Gateway Timeout", "timeout_error"),
}


class NotFoundError(InvalidRequestError):
    """No such path."""

    code = "not_found"


class MethodNotAllowedError(InvalidRequestError):
    """The path is there, the method is not."""

    code = "method_not_allowed"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is compressed or in a format that this route does not read."""

    code = "unsupported_media_type"


def public(error: Exception, request_id: str) -> PimoeError:
    """The error as the caller may see it: internal ones and those of links lose their text."""
    if not isinstance(error, PimoeError) or error.code not in TABLE or error.code == INTERNAL:
        return PimoeError(f"an internal error; the server's log has it under request {request_id}")
    if isinstance(error, LinkError):
        return type(error)("a part of the service could not be reached; try again", None, error.retry_after_s)
    return error


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error that was answered, and of what led to it. Their frames hold the request's
    body, and often the error: together they would stay until the garbage collector comes by."""
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            left += [one.__cause__, one.__context__]


def is_fault(error: Exception) -> bool:
    """Whether the error is ours to log, rather than the caller's or the load's."""
    return not isinstance(error, PimoeError) or error.code not in TABLE or TABLE[error.code].status == 500


def retry_after_s(error: PimoeError) -> float | None:
    """Seconds to wait before trying again; None where that would not help."""
    if not TABLE[error.code].retry:
        return None
    known = error.retry_after_s
    return known if known is not None and math.isfinite(known) and known >= 0 else DEFAULT_RETRY_AFTER_S


def openai_body(error: PimoeError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TABLE[error.code].openai_type
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def problem_body(error: PimoeError) -> dict[str, Any]:
    """RFC 9457 problem details."""
    row = TABLE[error.code]
    return {
        "type": "about:blank",
        "title": row.title,
        "status": row.status,
        "detail": error.message,
        "code": error.code,
        "param": error.param,
        "error": error.message,
    }


def item_body(error: PimoeError) -> dict[str, Any]:
    """One failed operation inside an `infer_many` answer."""
    body = {"code": error.code, "message": error.message, "param": error.param}
    return {"error": {**body, "status": TABLE[error.code].status, "retry_after_s": retry_after_s(error)}}


def render(error: PimoeError, openai: bool) -> tuple[int, bytes, bytes, Headers]:
    """Status, body, content type and extra headers for a public error."""
    headers: Headers = []
    wait_s = retry_after_s(error)
    if wait_s is not None:
        # The header knows whole seconds only; the OpenAI SDK prefers the milliseconds.
        headers.append((b"retry-after", str(max(1, math.ceil(wait_s))).encode()))
        headers.append((b"retry-after-ms", str(math.ceil(wait_s * 1000)).encode()))
    status = TABLE[error.code].status
    if openai:
        return status, orjson.dumps(openai_body(error)), b"application/json", headers
    return status, orjson.dumps(problem_body(error)), b"application/problem+json", headers
