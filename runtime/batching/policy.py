"""When a batch closes. Pure: numbers in, decision out; the clock is an argument.

Late binding, credit-gated: a batch is formed only when something downstream can take it. Downstream idle: at
once. Downstream busy: accumulate, until the batch is full, its oldest item has waited `max_wait_s` since it
*arrived*, or its head's slack is used up. `max_wait_s` is an upper bound, never a target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from ..errors import ConfigurationError


class CloseReason(StrEnum):
    """Why a batch was closed; a metric label."""

    FULL = "full"
    NEXT_DOES_NOT_FIT = "next_does_not_fit"
    MAX_WAIT = "max_wait"
    SLACK = "slack"
    IDLE = "idle"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds that a user sets.

    Attributes:
        max_batch_tokens: tokens (rows) of one batch.
        max_wait_s: how long an item may wait for company, from its arrival.
        max_in_flight: batches downstream at once (credits).
        max_patience_s: how much earlier a request of priority 0 must arrive to be served like one of priority 1.
        service_margin_s: how long before its deadline a request must be dispatched.
    """

    max_batch_tokens: int = 4096
    max_wait_s: float = 0.005
    max_in_flight: int = 2
    max_patience_s: float = 1.0
    service_margin_s: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("max_batch_tokens", 1), ("max_in_flight", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"batching.{name} is {getattr(self, name)}; must be at least {least}", name
                )
        for name in ("max_wait_s", "max_patience_s", "service_margin_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(
                    f"batching.{name} is {value}; it must be a finite number of seconds", name
                )


def patience_s(priority: float, max_patience_s: float) -> float:
    """How long a request of `priority` (0 to 1, 1 most urgent) lets later ones pass it by."""
    return (1.0 - priority) * max_patience_s


def virtual_deadline(
    arrival: float, deadline: float, priority: float, limits: BatchLimits, service_s: float = 0.0
) -> float:
    """The item's static sorting key. Since `now` cancels out of the comparison of two keys, nothing is ever sorted
    again, and an item is overtaken only by what arrives within the difference of the patiences: none starves."""
    urgent = deadline - service_s - limits.service_margin_s
    return min(arrival + patience_s(priority, limits.max_patience_s), urgent)


@dataclass(frozen=True, slots=True)
class QueueView:
    """What the decision needs to know of the queue.

    Attributes:
        tokens: of the batch that would be taken now.
        next_does_not_fit: whether an item stayed behind only for lack of room.
        oldest_arrival, latest_start: of the items that would be taken.
    """

    tokens: int
    next_does_not_fit: bool
    oldest_arrival: float
    latest_start: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Close now for `reason`, or (None) look again at `wake_at` unless something arrives or completes first."""

    reason: CloseReason | None
    wake_at: float = math.inf


def decide(view: QueueView, now: float, in_flight: int, limits: BatchLimits, draining: bool = False) -> Decision:
    """Whether the batch closes now."""
    if in_flight >= limits.max_in_flight:
        return Decision(None)  # no credit: a completion will wake us, and until then more may join
    if view.tokens >= limits.max_batch_tokens:
        return Decision(CloseReason.FULL)
    if view.next_does_not_fit:
        return Decision(CloseReason.NEXT_DOES_NOT_FIT)
    if draining:
        return Decision(CloseReason.DRAIN)
    if in_flight == 0:
        return Decision(CloseReason.IDLE)
    if now >= view.latest_start:
        return Decision(CloseReason.SLACK)
    if now >= view.oldest_arrival + limits.max_wait_s:
        return Decision(CloseReason.MAX_WAIT)
    return Decision(None, min(view.latest_start, view.oldest_arrival + limits.max_wait_s))
