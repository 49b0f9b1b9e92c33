"""How large a cache should be: by what one more step of size would bring, and what the last step brings.

Growing is measured by a ghost list: the keys, without their values, of what had to go lately, as much of it as one
step more would have held. Shrinking is measured by the tail: the entries that would go first, as much of them as
one step less would not hold. Both are counterfactuals of the policy in force, whichever that is; under FIFO the
oldest may well be the most asked for, and so it seldom shrinks. What a cache would do with twice its size they do
not say: where only far more room would help, as with a loop over more than it can hold, it stays small.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

STEPS = 16  # from the smallest to the largest size
GROW_GAIN = 0.01  # of all look-ups that a step must be worth to be taken
SHRINK_LOSS = 0.002  # that it may be worth and still be given back; far from GROW_GAIN, so that sizes do not flap
CALM_REVIEWS = 3  # in a row that must find so
MIN_PERIOD = 1000  # look-ups between reviews; more when there are more entries


class SizeRange(NamedTuple):
    """From where to where the size adapts."""

    min_bytes: int
    max_bytes: int

    @property
    def step_bytes(self) -> int:
        """What the size changes by at a time."""
        return -(-(self.max_bytes - self.min_bytes) // STEPS)

    def clamp(self, target_bytes: int) -> int:
        """The size in this range that is nearest to it."""
        return min(max(target_bytes, self.min_bytes), self.max_bytes)


class Evidence(NamedTuple):
    """Of one period.

    Attributes:
        ghost_hits: look-ups that one more step would have answered.
        tail_hits: look-ups that one step less would not have answered; none where a step is unused.
    """

    lookups: int
    ghost_hits: int
    tail_hits: int


def next_size(target_bytes: int, sizes: SizeRange, evidence: Evidence, calm: int) -> tuple[int, int]:
    """The size for the next period, and the number of calm reviews in a row, which `calm` was until now."""
    gain = evidence.ghost_hits / evidence.lookups
    if gain >= GROW_GAIN:
        return sizes.clamp(target_bytes + sizes.step_bytes), 0
    loss = evidence.tail_hits / evidence.lookups
    if max(gain, loss) > SHRINK_LOSS:
        return target_bytes, 0
    if calm + 1 < CALM_REVIEWS:
        return target_bytes, calm + 1
    return sizes.clamp(target_bytes - sizes.step_bytes), 0


class AdaptiveSize:
    """Collects the evidence and holds the size that follows from it. The cache tells it of every look-up and
    of every entry that goes, and asks it to `review` when that is due. It keeps as many keys as two steps may hold
    entries.

    Attributes:
        target_bytes: the size now.
    """

    def __init__(self, sizes: SizeRange, target_bytes: int) -> None:
        self.sizes = sizes
        self.target_bytes = sizes.clamp(target_bytes)
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()
        self._ghost_bytes = 0
        self._tail: set[bytes] = set()
        self._marked = 0  # entries in the tail when it was marked
        self._period = MIN_PERIOD
        self._calm = 0
        self._lookups = self._ghost_hits = self._tail_hits = 0

    def hit(self, key: bytes) -> None:
        """A look-up found it."""
        self._lookups += 1
        if key in self._tail:
            self._tail.discard(key)  # with less room it would be back now
            self._tail_hits += 1

    def missed(self, key: bytes) -> bool:
        """A look-up did not find it; whether one more step would have."""
        self._lookups += 1
        if (size_bytes := self._ghosts.pop(key, None)) is None:
            return False
        self._ghost_bytes -= size_bytes
        self._ghost_hits += 1
        return True

    def dropped(self, key: bytes) -> None:
        """The cache no longer holds it."""
        self._tail.discard(key)

    def lacked_room(self, key: bytes, size_bytes: int) -> None:
        """It is for the lack of room that the cache does not hold it."""
        self._ghost_bytes += size_bytes - self._ghosts.pop(key, 0)
        self._ghosts[key] = size_bytes
        # One stays, even if it is larger than a step: else a cache that is too small for it would never know.
        while self._ghost_bytes > self.sizes.step_bytes and len(self._ghosts) > 1:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    @property
    def is_due(self) -> bool:
        """Whether the period is over."""
        return self._lookups >= self._period

    @property
    def needs_marking(self) -> bool:
        """Whether so much of the tail has gone or been used that what is left of it says little."""
        return 2 * len(self._tail) < self._marked

    def review(self, entries: int) -> None:
        """Choose the size for the next period, in a cache that has so many entries."""
        evidence = Evidence(self._lookups, self._ghost_hits, self._tail_hits)
        self.target_bytes, self._calm = next_size(self.target_bytes, self.sizes, evidence, self._calm)
        self._period = max(MIN_PERIOD, entries)
        self._lookups = self._ghost_hits = self._tail_hits = 0

    def mark(self, coldest: Iterable[tuple[bytes, int]], free_bytes: int) -> None:
        """Mark the tail: of these entries, in the order in which they would go, those that one step less would
        cost, in a cache with so much room left."""
        missing = self.sizes.step_bytes - free_bytes
        self._tail = set()
        for key, size_bytes in coldest:
            if missing <= 0:
                break
            self._tail.add(key)
            missing -= size_bytes
        self._marked = len(self._tail)
