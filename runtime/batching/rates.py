"""How fast things come and go, measured: exponentially weighted, with the clock as an argument."""

from __future__ import annotations

import math

_TIME_CONSTANT_S = 5.0


class DecayingRate:
    """Amount per second, where what is `time_constant_s` old counts for a third of what is new."""

    def __init__(self, time_constant_s: float = _TIME_CONSTANT_S) -> None:
        self._time_constant_s = time_constant_s
        self._sum = 0.0
        self._updated = self._started = -math.inf

    def age_s(self, now: float) -> float:
        """How long it has measured."""
        return max(0.0, now - self._started) if math.isfinite(self._started) else 0.0

    def add(self, amount: float, now: float) -> None:
        """Count `amount` at `now`."""
        if math.isinf(self._started):
            self._started = now
        self._sum = self._decayed(now) + amount
        self._updated = max(now, self._updated)

    def per_s(self, now: float) -> float:
        """The rate as of `now`; 0 before anything was counted."""
        if math.isinf(self._started):
            return 0.0
        # A young meter has seen less than its time constant: divide by what it did see.
        seen = 1.0 - math.exp(-max(now - self._started, 1e-3) / self._time_constant_s)
        return self._decayed(now) / (self._time_constant_s * seen)

    def _decayed(self, now: float) -> float:
        return self._sum * math.exp(-max(0.0, now - self._updated) / self._time_constant_s) if self._sum else 0.0


class DrainRate:
    """Tokens per second that leave a queue while it is never empty: how fast a backlog is worked off.

    An idle queue says nothing about that: what comes is gone at once. So only the time between two departures
    with something waiting all the while counts.
    """

    def __init__(self, time_constant_s: float = _TIME_CONSTANT_S) -> None:
        self._time_constant_s = time_constant_s
        self._tokens = self._seconds = 0.0
        self._busy_since: float | None = None

    def left(self, tokens: int, still_waiting: bool, now: float) -> None:
        """`tokens` have been taken to be served; `still_waiting`: others stayed behind."""
        if self._busy_since is not None and (elapsed_s := now - self._busy_since) > 0:
            keep = math.exp(-elapsed_s / self._time_constant_s)
            self._tokens = self._tokens * keep + tokens
            self._seconds = self._seconds * keep + elapsed_s
            self._busy_since = now
        elif self._busy_since is not None:
            self._tokens += tokens
        else:
            self._busy_since = now
        if not still_waiting:
            self._busy_since = None

    def emptied(self) -> None:
        """The queue is empty."""
        self._busy_since = None

    @property
    def tokens_per_s(self) -> float | None:
        """The rate; None while it is not known."""
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        return rate if rate > 0 else None  # after a long rest it may be too small for a number
