"""How much may wait, and for how long: the bounds of a queue."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigurationError
from .classes import CLASS_NAMES

Order = Literal["priority", "fifo"]


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds that a user sets, also while serving.

    Attributes:
        max_tokens: of all waiting items together.
        max_items: however small they are.
        retry_after_s: what a refused client is told while no rate is known.
        class_shares: part of `max_tokens` and of `max_items` that each class may hold, from "batch" to
            "interactive": what is less important can never fill the queue.
        target_delay_s: how much later than its patience allows an item may still be served under overload; after
            that it gives way (`overload.py`). The overtaking bound is patience plus this.
        standing_s: a queue that stays later than `target_delay_s` for so long is standing, and is cut down.
        min_share: part of the batches that each class keeps while more important work is late.
        order: "priority", or "fifo" for one queue in order of arrival, without classes, to compare with.
    """

    max_tokens: int = 262_144
    max_items: int = 8192
    retry_after_s: float = 1.0
    class_shares: tuple[float, ...] = (0.5, 0.6, 0.8, 0.9, 1.0)
    target_delay_s: float = 2.0
    standing_s: float = 1.0
    min_share: float = 1 / 16
    order: Order = "priority"

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_items", "retry_after_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"queue.{name} is {getattr(self, name)}; it must be above 0", name)
        for name in ("target_delay_s", "standing_s", "min_share"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"queue.{name} is {value}; it must be a number of at least 0", name)
        if len(self.class_shares) != len(CLASS_NAMES) or not all(0 < share <= 1 for share in self.class_shares):
            raise ConfigurationError(
                f"queue.class_shares is {self.class_shares}; it must be {len(CLASS_NAMES)} numbers above 0 and up "
                f"to 1, for {', '.join(CLASS_NAMES)}",
                "class_shares",
            )
        if self.min_share * len(CLASS_NAMES) > 1:
            raise ConfigurationError(
                f"queue.min_share is {self.min_share}; {len(CLASS_NAMES)} of them must fit into 1", "min_share"
            )
        if self.order not in ("priority", "fifo"):
            raise ConfigurationError(f"queue.order is {self.order!r}; it must be priority or fifo", "order")

    @property
    def prioritised(self) -> bool:
        """Whether priorities count."""
        return self.order == "priority"

    def class_has_room(self, rank: int, items: int, tokens: int, more_tokens: int) -> bool:
        """Whether a class that holds so much may take one more item. One may always be there, however large."""
        if not self.prioritised or items == 0:
            return True
        share = self.class_shares[rank]
        return items + 1 <= self.max_items * share and tokens + more_tokens <= self.max_tokens * share
