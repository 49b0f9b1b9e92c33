"""What a client raises, one tree. Each class has a stable `code`, the server's own where the server said it.

    PimoeClientError                 internal_error, or any code that this version does not know
    ├── InvalidRequestError          invalid_request
    │   ├── ModelNotFoundError       model_not_found
    │   ├── InvalidTensorError       invalid_tensor
    │   ├── ContextLengthError       context_length_exceeded
    │   └── PayloadTooLargeError     payload_too_large
    ├── OverloadedError              overloaded             (retried; retry_after_s)
    ├── DeadlineExceededError        deadline_exceeded
    ├── RequestCancelledError        request_cancelled
    ├── UnavailableError             unavailable            (retried; retry_after_s)
    ├── ConnectionFailed             connection_failed      (retried until an answer begins)
    └── ProtocolError                protocol_error         (the answer is none that pimoe gives)

The classes mirror those of the server but are not the same: a client never imports the runtime. All survive
`pickle`, so that they may cross a process pool or Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

_RETRYABLE_STATUSES = frozenset({429, 502, 503})


class PimoeClientError(Exception):
    """Base of every error that a call to pimoe may end with.

    Args:
        message: what went wrong.
        code: stable identifier; None takes the class's own.
        status: HTTP status, where there was an answer.
        param: the request field at fault, where there is one.
        retry_after_s: seconds after which the same request may succeed, where the server said so.
        request_id: the server's name for this request, to be looked for in its logs.

    """

    code: str = "internal_error"
    _passes: ClassVar[bool] = False  # whether what is wrong may pass

    def __init__(
        self,
        message: str,
        code: str | None = None,
        status: int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        # All arguments go to Exception.__init__, so that pickling rebuilds the same error.
        super().__init__(message, code, status, param, retry_after_s, request_id)
        self.message = message
        self.code = code or type(self).code
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        return self._passes or self.status in _RETRYABLE_STATUSES

    def __str__(self) -> str:
        facts = [self.code]
        facts += [] if self.status is None else [f"HTTP {self.status}"]
        facts += [] if self.request_id is None else [f"request {self.request_id}"]
        return f"{self.message} ({', '.join(facts)})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class InvalidRequestError(PimoeClientError):
    """The request itself is wrong; sending it again unchanged fails again."""

    code = "invalid_request"


class ModelNotFoundError(InvalidRequestError):
    """No model of that name is served there."""

    code = "model_not_found"


class InvalidTensorError(InvalidRequestError):
    """An array has the wrong dtype, shape or byte length, or holds NaN or Inf."""

    code = "invalid_tensor"


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens together exceed the model's context."""

    code = "context_length_exceeded"


class PayloadTooLargeError(InvalidRequestError):
    """The request is larger than the server's limit, or an answer larger than the client's."""

    code = "payload_too_large"


class OverloadedError(PimoeClientError):
    """The server's queue is full; nothing was computed. Try again after `retry_after_s`."""

    code = "overloaded"
    _passes = True


class DeadlineExceededError(PimoeClientError):
    """The request's time ran out before it was answered."""

    code = "deadline_exceeded"


class RequestCancelledError(PimoeClientError):
    """The server gave the request up before answering it, for instance because it is shutting down."""

    code = "request_cancelled"


class UnavailableError(PimoeClientError):
    """A part that is needed has no live replica, or a proxy reaches no server."""

    code = "unavailable"
    _passes = True


class ConnectionFailed(PimoeClientError):
    """Nothing listens there, or the connection broke before the whole answer had come."""

    code = "connection_failed"
    _passes = True


class ProtocolError(PimoeClientError):
    """The answer is none that pimoe gives: perhaps the address is that of something else."""

    code = "protocol_error"


def _tree(root: type[PimoeClientError]) -> dict[str, type[PimoeClientError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


ERRORS_BY_CODE: dict[str, type[PimoeClientError]] = _tree(PimoeClientError)

# For answers that carry no code of pimoe's, as those of a proxy in between.
_CODES_BY_STATUS = {
    400: "invalid_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    408: "deadline_exceeded",
    413: "payload_too_large",
    422: "invalid_request",
    429: "overloaded",
    502: "unavailable",
    503: "unavailable",
    504: "deadline_exceeded",
}
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Origin:
    """What an answer's head says about any error in it."""

    status: int | None = None
    retry_after_s: float | None = None
    request_id: str | None = None


def error_from_object(found: Mapping[str, Any], origin: Origin | None = None) -> PimoeClientError:
    """The error that `{"code", "message", "param"}` describes; an unknown code gives the base class.

    Args:
        origin: None where the object itself may hold "status" and "retry_after_s", as in `infer_many`.
    """
    origin = origin or Origin(found.get("status"), found.get("retry_after_s"))
    code, param = str(found.get("code") or PimoeClientError.code), found.get("param")
    return ERRORS_BY_CODE.get(code, PimoeClientError)(
        str(found.get("message") or "the server gave no reason"),
        code,
        origin.status,
        None if param is None else str(param),
        origin.retry_after_s,
        origin.request_id,
    )


def error_from_answer(call: str, origin: Origin, body: bytes) -> PimoeClientError:
    """The error in an answer that is no success: OpenAI's object, RFC 9457, or whatever a proxy wrote.

    Args:
        call: method and URL, for the message when the answer explains nothing.
    """
    found = _described(body)
    message = found.get("message") or found.get("detail") or found.get("title")
    code = found.get("code") or _CODES_BY_STATUS.get(origin.status or 0, "internal_error")
    if not message:
        text = body.decode("utf-8", "replace").strip()[:_SHOWN_CHARACTERS] or "an empty body"
        message = f"{call} was answered with {text}" + ("; is it a pimoe server?" if origin.status == 404 else "")
    return error_from_object({"code": code, "message": message, "param": found.get("param")}, origin)


def _described(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    inner = found.get("error") if isinstance(found, dict) else None
    if isinstance(inner, dict):
        return inner
    return found if isinstance(found, dict) else {}
