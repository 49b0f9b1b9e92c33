"""A queue's books: what waits and what became of the rest, by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..histogram import Histogram
from .classes import CLASS_NAMES


class ClassBooks:
    """One class of a queue: items and tokens that wait now, and counts since start."""

    __slots__ = ("cancelled", "expired", "items", "refused", "shed", "tokens", "waits")

    def __init__(self) -> None:
        self.items = self.tokens = 0
        self.refused = self.shed = self.expired = self.cancelled = 0
        self.waits = Histogram()

    def came(self, tokens: int) -> None:
        """An item is queued."""
        self.items += 1
        self.tokens += tokens

    def went(self, tokens: int) -> None:
        """An item has left, in whatever way."""
        self.items -= 1
        self.tokens -= tokens

    def served(self, wait_s: float) -> None:
        """An item was dispatched, so long after it came."""
        self.waits.add(wait_s)

    def snapshot(self) -> dict[str, Any]:
        """Plain values for the status page."""
        counts = {name: getattr(self, name) for name in self.__slots__ if name != "waits"}
        return {**counts, "waits": self.waits.snapshot()}


class QueueStatistics(NamedTuple):
    """What waits now, and how many were refused, shed, expired and cancelled since start; the rate at which a
    backlog is worked off, 0 while it is not known; all but the rate by class, with histograms of waits."""

    items: int
    tokens: int
    refused: int
    shed: int
    expired: int
    cancelled: int
    tokens_per_s: float
    classes: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, books: Sequence[ClassBooks], tokens_per_s: float | None) -> QueueStatistics:
        """The sums over all classes, and the classes."""
        sums = {name: sum(getattr(each, name) for each in books) for name in cls._fields[:6]}
        classes = {str(name): each.snapshot() for name, each in zip(CLASS_NAMES, books, strict=True)}
        return cls(**sums, tokens_per_s=tokens_per_s or 0.0, classes=classes)
