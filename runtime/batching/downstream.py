"""What the batcher knows of what lies behind it: how long batches take there, how busy it is, when it is free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .latency import AimdLimit, LatencyModel
from .policy import BatchLimits
from .rates import DecayingRate

# From the decision to send a batch until it is computed on; downstream would idle for so long.
_WAY_S = 0.008


@dataclass(slots=True, eq=False)
class Flight:
    """A batch downstream.

    Attributes:
        spare_s: what its items can spare for being computed: the shortest of their timeouts.
    """

    tokens: int
    dispatched: float
    spare_s: float


class Downstream:
    """Batches in flight are taken to be worked off in turn, as many at once as there are servers. The time of a
    batch is measured from when the one before it ended, so that what runs side by side makes it shorter.

    Args:
        servers: how many batches downstream computes at once, as of now: replicas of the group that has fewest.
            None: not known; then nothing is held back for being bound too early.
    """

    def __init__(self, scale_tokens: int, servers: Callable[[], int] | None = None) -> None:
        self.latency = LatencyModel(scale_tokens)
        self._servers = servers
        self._aimd = AimdLimit()
        self._flights: list[Flight] = []
        self._busy_s = DecayingRate()
        self._busy_since = math.inf
        self._completed_at = -math.inf

    def dispatched(self, tokens: int, spare_s: float, now: float) -> Flight:
        """A batch is sent."""
        flight = Flight(tokens, now, spare_s)
        self._flights.append(flight)
        self._busy_since = min(self._busy_since, now)
        return flight

    def computed(self, flight: Flight, tokens: int, largest_expert_tokens: int, now: float) -> None:
        """A batch has its results: learn from it.

        Args:
            tokens: those that were computed; some may have left before.
        """
        seconds = self._own_s(flight, now)
        self.latency.observe(tokens, largest_expert_tokens or None, seconds)
        # Not whether its items were in time: under overload they are late for having waited, and smaller batches
        # would make that worse.
        self._aimd.observe(seconds <= flight.spare_s / 2)

    def abandoned(self, flight: Flight, now: float) -> None:
        """A batch was cancelled, all its callers having left: it would have taken longer still."""
        seconds = self._own_s(flight, now)
        if seconds > max(self.latency.predict_s(flight.tokens), flight.spare_s / 2):
            self.latency.observe(flight.tokens, None, seconds)
            self._aimd.observe(False)

    def ended(self, flight: Flight, now: float) -> None:
        """A batch has ended in any way; after `computed` or `abandoned`."""
        self._flights.remove(flight)
        self._count_busy(now)
        self._completed_at = now

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._flights

    def batch_s(self, tokens: int) -> float:
        """How long a batch takes: as predicted, or, while that is not to be trusted, as lately."""
        return self.latency.predict_s(tokens) or self.latency.mean_s

    def free_at(self, now: float) -> float:
        """When a batch that is dispatched now would begin."""
        servers = 1 if self._servers is None else max(1, self._servers())
        before = self._flights[: len(self._flights) - servers + 1] if len(self._flights) >= servers else []
        if not before:
            return now
        began = max(self._completed_at, before[0].dispatched)
        return max(now, began + sum(self.latency.predict_s(flight.tokens) for flight in before))

    def hold_until(self, now: float) -> float:
        """Before this, a batch sent would only wait behind those in flight, bound already when something more
        urgent comes. What is left of their time covers the way there and the error of the estimate. A batch that
        ends early wakes the batcher anyway."""
        if self._servers is None or not self.latency.trusted:
            return now
        return self.free_at(now) - self.spare_s

    @property
    def spare_s(self) -> float:
        """What a batch must be sent earlier than the estimate says, so as not to be late."""
        return max(_WAY_S, 2.0 * self.latency.deviation_s)

    def utilisation(self, now: float) -> float:
        """Share of the time, lately, in which something was in flight."""
        self._count_busy(now)
        return min(1.0, self._busy_s.per_s(now))

    def max_tokens(self, limits: BatchLimits) -> int:
        """The user's bound, or a lower one where the latency model fits too badly to size batches by it."""
        if self.latency.trusted:
            return limits.max_batch_tokens
        return self._aimd.tokens(limits.min_batch_tokens, limits.max_batch_tokens)

    def fixed_share(self, tokens: int) -> float:
        """See `policy.Load`."""
        expected_s = self.latency.predict_s(tokens)
        return self.latency.fixed_s / expected_s if expected_s > 0 else 1.0

    def _own_s(self, flight: Flight, now: float) -> float:
        """Of two batches in flight the later one waits for the earlier: that is not its own time."""
        return now - max(flight.dispatched, self._completed_at)

    def _count_busy(self, now: float) -> None:
        if self._busy_since < now:
            self._busy_s.add(now - self._busy_since, now)
        self._busy_since = now if self._flights else math.inf
