"""When a batch closes. Pure: numbers in, decision out; the clock is an argument.

Late binding, credit-gated: a batch is formed only when something downstream can take it. Downstream idle: at
once. Downstream busy, with a credit left: accumulate where that pays (`lingering_pays`), until the batch is full,
its oldest item has waited `max_wait_s` since it *arrived*, or its head's slack is used up. `max_wait_s` is an
upper bound, never a target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from ..errors import ConfigurationError
from .limits import QueueLimits


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
    """Bounds that a user sets, also while serving.

    Attributes:
        max_batch_tokens: tokens (rows) of one batch.
        max_wait_s: how long an item may wait for company, from its arrival.
        max_in_flight: batches downstream at once (credits).
        max_patience_s: how much earlier a request of priority 0 must arrive to be served like one of priority 1.
        service_margin_s: how long before its deadline, and besides the expected service, a request must be
            dispatched.
        min_batch_tokens: smaller batches wait for company up to `max_wait_s` even when downstream is idle; and no
            deadline makes a batch smaller than this.
    """

    max_batch_tokens: int = 4096
    max_wait_s: float = 0.005
    max_in_flight: int = 2
    max_patience_s: float = 1.0
    service_margin_s: float = 0.0
    min_batch_tokens: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("min_batch_tokens", 1),
            ("max_batch_tokens", self.min_batch_tokens),
            ("max_in_flight", 1),
        ):
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


# Patience is at most this part of a request's own time: who has little is not patient.
_PATIENCE_SHARE = 0.1


def patience_s(priority: float, max_patience_s: float, timeout_s: float = math.inf) -> float:
    """How long a request of `priority` (0 to 1, 1 most urgent) lets later ones pass it by."""
    return (1.0 - priority) * min(max_patience_s, _PATIENCE_SHARE * timeout_s)


def virtual_deadline(
    arrival: float, deadline: float, priority: float, limits: BatchLimits, service_s: float = 0.0
) -> float:
    """The item's static sorting key. Since `now` cancels out of the comparison of two keys, nothing is ever sorted
    again, and an item is overtaken only by what arrives within the difference of the patiences: none starves."""
    urgent = deadline - service_s - limits.service_margin_s
    # Not before it came: what has no slack left must not pass by what waits for longer than the bound allows.
    patience = patience_s(priority, limits.max_patience_s, deadline - arrival)
    return max(arrival, min(arrival + patience, urgent))


def sort_key(
    queue_limits: QueueLimits,
    limits: BatchLimits,
    arrival: float,
    deadline: float,
    priority: float,
    service_s: float,
) -> float:
    """The key of an item in the queue's order: its virtual deadline, or its arrival."""
    if not queue_limits.prioritised:
        return arrival
    return virtual_deadline(arrival, deadline, priority, limits, service_s)


def overtaking_bound_s(priority: float, limits: BatchLimits, target_s: float) -> float:
    """The published bound: nothing of this priority waits on while something of its group that arrived more than
    this later is dispatched.

    Args:
        target_s: `OverloadControl.target_s`, how late an item may be before it is given up for others.
    """
    return patience_s(priority, limits.max_patience_s) + target_s


@dataclass(frozen=True, slots=True)
class QueueView:
    """What the decision needs to know of the queue.

    Attributes:
        tokens: of the batch that would be taken now.
        next_does_not_fit: whether an item stayed behind only for lack of room.
        oldest_arrival: of the items that would be taken.
        latest_start: when the batch must be dispatched for all of them to be in time.
    """

    tokens: int
    next_does_not_fit: bool
    oldest_arrival: float
    latest_start: float


@dataclass(frozen=True, slots=True)
class Load:
    """What was measured lately, to tell whether lingering pays.

    Attributes:
        arrivals_per_s: items.
        utilisation: share of the time in which something ran downstream, 0 to 1.
        fixed_share: the part of a batch's time, as large as it is now, that does not grow with its tokens: what is
            saved when company joins. 1 while it is not known.
    """

    arrivals_per_s: float
    utilisation: float
    fixed_share: float = 1.0


# Below this utilisation capacity is there to be used; nobody waits for what a fuller batch would save.
_BUSY = 0.5
# Saving less than this part of a batch's time is not worth anybody's wait.
_WORTHWHILE = 0.05


def lingering_pays(load: Load, window_s: float) -> bool:
    """Whether to hold a batch for up to `window_s` although downstream has a credit: company must be likely to
    come, its joining must save something, and what is saved must be needed."""
    expected = load.arrivals_per_s * window_s
    return expected >= 1.0 and load.utilisation >= _BUSY and load.fixed_share >= _WORTHWHILE


@dataclass(frozen=True, slots=True)
class Decision:
    """Close now for `reason`, or (None) look again at `wake_at` unless something arrives or completes first."""

    reason: CloseReason | None
    wake_at: float = math.inf


def decide(
    view: QueueView,
    now: float,
    in_flight: int,
    limits: BatchLimits,
    draining: bool = False,
    load: Load | None = None,
) -> Decision:
    """Whether the batch closes now.

    Args:
        load: None where nothing was measured: then it lingers.
    """
    if in_flight >= limits.max_in_flight:
        return Decision(None)  # no credit: a completion will wake us, and until then more may join
    if view.tokens >= limits.max_batch_tokens:
        return Decision(CloseReason.FULL)
    if view.next_does_not_fit:
        return Decision(CloseReason.NEXT_DOES_NOT_FIT)
    if draining:
        return Decision(CloseReason.DRAIN)
    if in_flight == 0 and view.tokens >= limits.min_batch_tokens:
        return Decision(CloseReason.IDLE)
    if now >= view.latest_start:
        return Decision(CloseReason.SLACK)
    waited_out = view.oldest_arrival + limits.max_wait_s
    if now >= waited_out:
        return Decision(CloseReason.MAX_WAIT)
    if view.tokens >= limits.min_batch_tokens and load is not None and not lingering_pays(load, waited_out - now):
        return Decision(CloseReason.IDLE)  # a credit is, and nothing is worth waiting for
    return Decision(None, min(view.latest_start, waited_out))
