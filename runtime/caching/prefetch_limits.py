"""What prefetching may take, and when it may take the next of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

from ..errors import ConfigurationError
from .sequences import MAX_COUNT

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class PrefetchLimits:
    """What prefetching may take.

    Attributes:
        enabled: without it nothing is recorded, kept or computed.
        max_per_minute: computations begun in any minute.
        max_time_share: of the time, spent computing; after each computation there is a pause accordingly.
        min_confidence: share of times that a request must have followed another one, over 0, to 1.
        min_occurrences: how often it must have.
        max_nodes: requests that are known at a time.
        max_request_bytes: of all requests that are kept.
        horizon_s: how long after a request another one still follows it, and so how long a prediction holds.
    """

    enabled: bool = False
    max_per_minute: int = 30
    max_time_share: float = 0.1
    min_confidence: float = 0.5
    min_occurrences: int = 3
    max_nodes: int = 4096
    max_request_bytes: int = 16 * 2**20
    horizon_s: float = 60.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value, name = getattr(self, item.name), item.name
            if not value >= 0:
                raise ConfigurationError(f"prefetch.{name} is {value}; it must not be negative", name)
        for name in ("max_time_share", "min_confidence"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ConfigurationError(f"prefetch.{name} is {value}; it must be over 0 and at most 1", name)
        if not 1 <= self.min_occurrences <= MAX_COUNT / 2:
            raise ConfigurationError(
                f"prefetch.min_occurrences is {self.min_occurrences}; it must be from 1 to {MAX_COUNT / 2:.0f}",
                "min_occurrences",
            )


class Budget:
    """When the next computation may begin. Pure: `now_s` comes in."""

    def __init__(self) -> None:
        self._begun: deque[float] = deque()
        self._rested = float("-inf")

    def left(self, limits: PrefetchLimits, now_s: float) -> int:
        """Computations that may still begin in the minute that ends now."""
        while self._begun and self._begun[0] <= now_s - _MINUTE_S:
            self._begun.popleft()
        return max(0, limits.max_per_minute - len(self._begun))

    def wait_s(self, limits: PrefetchLimits, now_s: float) -> float:
        """How long to wait before the next one; infinite when none is allowed at all."""
        if self.left(limits, now_s):
            return max(0.0, self._rested - now_s)
        oldest = self._begun[-limits.max_per_minute] if limits.max_per_minute else float("inf")
        return max(oldest + _MINUTE_S, self._rested) - now_s

    def spent(self, limits: PrefetchLimits, began_s: float, now_s: float) -> None:
        """One has ended: rest for as long as makes its time the share that is allowed."""
        self._rested = now_s + (now_s - began_s) * (1 / limits.max_time_share - 1)

    def began(self, now_s: float) -> None:
        """One begins."""
        self._begun.append(now_s)
