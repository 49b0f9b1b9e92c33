"""Every error of pimoe, one tree. Each class has a stable `code` that clients may switch on.

    PimoeError                       internal_error
    ├── InvalidRequestError          invalid_request
    │   ├── ModelNotFoundError       model_not_found
    │   ├── InvalidTensorError       invalid_tensor
    │   ├── ContextLengthError       context_length_exceeded
    │   └── PayloadTooLargeError     payload_too_large
    ├── OverloadedError              overloaded             (retry_after_s)
    ├── DeadlineExceededError        deadline_exceeded
    ├── RequestCancelledError        request_cancelled
    ├── UnavailableError             unavailable            (retry_after_s)
    ├── ConfigurationError           invalid_configuration
    │   ├── CheckpointError          invalid_checkpoint
    │   ├── UnknownFamilyError       unknown_model_family
    │   └── InsufficientResourcesError  insufficient_resources
    └── LinkError                    link_error
        ├── LinkClosedError          link_closed
        ├── LinkProtocolError        link_protocol_error
        └── LinkAuthenticationError  link_authentication_failed

An error crosses a process as `to_wire()` (plain values, no pickle) and comes back, of the same class, by
`from_wire()`. All also survive `pickle`, because Ray's control plane pickles what a replica raises.
"""

from __future__ import annotations

from typing import Any


class PimoeError(Exception):
    """Base of every error raised by pimoe.

    Args:
        message: what went wrong, naming the field, the value and what would be right.
        param: the request field at fault, where there is one.
        retry_after_s: seconds after which the same request may succeed, where that is known.
    """

    code = "internal_error"

    def __init__(self, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        # All arguments go to Exception.__init__, so that pickling rebuilds the same error.
        super().__init__(message, param, retry_after_s)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, Any]:
        """The error as plain values for a link frame."""
        return {
            "code": self.code,
            # What a message quotes of a request may hold lone surrogates, which UTF-8 cannot carry.
            "message": self.message.encode("utf-8", "backslashreplace").decode(),
            "param": self.param,
            "retry_after_s": self.retry_after_s,
        }


class InvalidRequestError(PimoeError):
    """The request itself is wrong; sending it again unchanged fails again."""

    code = "invalid_request"


class ModelNotFoundError(InvalidRequestError):
    """No model of that name is served here."""

    code = "model_not_found"


class InvalidTensorError(InvalidRequestError):
    """A tensor has the wrong name, dtype, shape or byte length, or holds NaN or Inf."""

    code = "invalid_tensor"


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens together exceed the model's context."""

    code = "context_length_exceeded"


class PayloadTooLargeError(InvalidRequestError):
    """The body is larger than the configured limit."""

    code = "payload_too_large"


class OverloadedError(PimoeError):
    """A bounded queue is full; nothing was computed. Try again after `retry_after_s`."""

    code = "overloaded"


class DeadlineExceededError(PimoeError):
    """The request's time ran out before it was answered."""

    code = "deadline_exceeded"


class RequestCancelledError(PimoeError):
    """The caller left, or the server is shutting down, before the answer."""

    code = "request_cancelled"


class UnavailableError(PimoeError):
    """A part that is needed (an expert group, a router) has no live replica."""

    code = "unavailable"


class ConfigurationError(PimoeError):
    """A setting is wrong."""

    code = "invalid_configuration"


class CheckpointError(ConfigurationError):
    """A checkpoint folder is missing, corrupt or truncated; the message names the file and tensor."""

    code = "invalid_checkpoint"


class UnknownFamilyError(ConfigurationError):
    """The checkpoint's `model_type` is none that pimoe knows; the message lists those it does."""

    code = "unknown_model_family"


class InsufficientResourcesError(ConfigurationError):
    """The cluster has too few CPUs or GPUs for the deployments; the message says what is missing."""

    code = "insufficient_resources"


class LinkError(PimoeError):
    """A link between two processes failed."""

    code = "link_error"


class LinkClosedError(LinkError):
    """The other end went away; calls in flight were not answered."""

    code = "link_closed"


class LinkProtocolError(LinkError):
    """The other end sent bytes that are no frame, or a frame over the limits."""

    code = "link_protocol_error"


class LinkAuthenticationError(LinkError):
    """The other end did not prove that it knows the application's link secret."""

    code = "link_authentication_failed"


def _tree(root: type[PimoeError]) -> dict[str, type[PimoeError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


ERRORS_BY_CODE: dict[str, type[PimoeError]] = _tree(PimoeError)


def from_wire(wire: dict[str, Any]) -> PimoeError:
    """The error that `to_wire` described; an unknown code becomes a plain `PimoeError`."""
    kind = ERRORS_BY_CODE.get(str(wire.get("code")), PimoeError)
    return kind(str(wire.get("message", "")), wire.get("param"), wire.get("retry_after_s"))
