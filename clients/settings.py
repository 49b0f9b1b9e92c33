"""How a client connects, waits and tries again: frozen values, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


def _check_numbers(settings: object, may_be_zero: frozenset[str]) -> None:
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        least = "at least 0" if field.name in may_be_zero else "more than 0"
        too_small = value < 0 or (value == 0 and field.name not in may_be_zero)
        if not math.isfinite(value) or too_small:
            raise ValueError(f"{type(settings).__name__}.{field.name} is {value!r}, and must be {least}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one client.

    Attributes:
        max_connections: sockets open at once; further calls wait for one within their own time.
        connect_timeout_s: for opening one connection.
        idle_timeout_s: longest silence within a stream, once its first event has come.
        grace_s: how much longer than the request's own time the client waits, so that the server's error,
            which says more, arrives first.
        keepalive_s: how long an unused connection is kept.
        max_response_bytes: largest answer read; a larger one raises `PayloadTooLargeError`.
        max_event_bytes: largest single event of a stream.
        batch_operations, batch_bytes: most that `infer_many` puts into one request; more goes into several. Half
            of what a server takes unless it is told otherwise, in bytes.
    """

    max_connections: int = 100
    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 60.0
    grace_s: float = 2.0
    keepalive_s: float = 30.0
    max_response_bytes: int = 2**30
    max_event_bytes: int = 2**24
    batch_operations: int = 256
    batch_bytes: int = 2**25

    def __post_init__(self) -> None:
        _check_numbers(self, frozenset({"grace_s"}))


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed call is sent again. Inference has no side effects, so every call may be. What bounds it is
    the call's own time, `max_retries`, and a budget shared by all calls of a client, since clients that retry
    without one turn an overload into an outage (Google SRE book, "Addressing Cascading Failures"; Finagle's
    RetryBudget).

    Attributes:
        max_retries: per call; 0 never retries.
        base_delay_s: the first pause is drawn from [0, base_delay_s], later ones from twice as much each time.
        max_delay_s: no drawn pause is longer. What the server asks for with `Retry-After` comes on top.
        budget_ratio: how many retries each call earns.
        budget_per_s: retries earned per second whatever the load, so that a quiet client can always retry.
        budget_burst: most retries that can be saved up, and what a new client begins with.
    """

    max_retries: int = 4
    base_delay_s: float = 0.1
    max_delay_s: float = 5.0
    budget_ratio: float = 0.2
    budget_per_s: float = 10.0
    budget_burst: float = 100.0

    def __post_init__(self) -> None:
        _check_numbers(self, frozenset(field.name for field in fields(self)))
