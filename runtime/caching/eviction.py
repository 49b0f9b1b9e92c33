"""Which entry makes room for the next: the policies that a cache may be configured with.

A policy knows keys and sizes; values, ages and bounds are the cache's. All of them take constant time for each
entry and look-up, amortized, and none looks at a clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, get_args

from .w_tinylfu import WTinyLfu

PolicyName = Literal["lru", "fifo", "sieve", "w-tinylfu"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


class EvictionPolicy(Protocol):
    """The order in which entries go. The cache tells it of everything that happens to a key."""

    def added(self, key: bytes, size_bytes: int) -> None:
        """An entry is to be stored; no entry of that key is known. `victim` then names it only to refuse it."""
        ...

    def touched(self, key: bytes) -> None:
        """An entry was given out."""
        ...

    def missed(self, key: bytes) -> None:
        """What is not stored was asked for."""
        ...

    def removed(self, key: bytes) -> None:
        """An entry is gone for another reason than room; the policy forgets it."""
        ...

    def victim(self) -> tuple[bytes, bool]:
        """Choose who goes next and forget it: its key, and whether admission refused it. To be asked only after
        `added` or `resize`, while more is stored than there is room for."""
        ...

    def resize(self, capacity_bytes: int) -> None:
        """So many bytes are there from now on."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """All keys, about in the order in which they would go if nothing were asked any more."""
        ...


class Fifo:
    """First in, first out."""

    def __init__(self, capacity_bytes: int = 0) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, size_bytes: int) -> None:
        """See `EvictionPolicy`."""
        self._order[key] = None

    def touched(self, key: bytes) -> None:
        """See `EvictionPolicy`."""

    def missed(self, key: bytes) -> None:
        """See `EvictionPolicy`."""

    def removed(self, key: bytes) -> None:
        """See `EvictionPolicy`."""
        del self._order[key]

    def victim(self) -> tuple[bytes, bool]:
        """See `EvictionPolicy`."""
        return self._order.popitem(last=False)[0], False

    def resize(self, capacity_bytes: int) -> None:
        """See `EvictionPolicy`."""

    def __iter__(self) -> Iterator[bytes]:
        """See `EvictionPolicy`."""
        return iter(self._order)


class Lru(Fifo):
    """Least recently used first."""

    def touched(self, key: bytes) -> None:
        """See `EvictionPolicy`."""
        self._order.move_to_end(key)


class Sieve:
    """First in, first out, except that a hand passes over what was used since it last came by, and that this stays
    where it is (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024).

    The queue is cut where the hand is: `_passed` lies behind it, oldest first, `_ahead` before it, newest last. So
    the hand moves without links between entries, and a queue of Python's own does for each part.
    """

    def __init__(self, capacity_bytes: int = 0) -> None:
        self._passed: OrderedDict[bytes, bool] = OrderedDict()
        self._ahead: OrderedDict[bytes, bool] = OrderedDict()
        self._newest: bytes | None = None  # not in the queue yet when room is made for it

    def added(self, key: bytes, size_bytes: int) -> None:
        """See `EvictionPolicy`."""
        self._ahead[key] = False
        self._newest = key

    def touched(self, key: bytes) -> None:
        """See `EvictionPolicy`."""
        (self._ahead if key in self._ahead else self._passed)[key] = True

    def missed(self, key: bytes) -> None:
        """See `EvictionPolicy`."""

    def removed(self, key: bytes) -> None:
        """See `EvictionPolicy`."""
        del (self._ahead if key in self._ahead else self._passed)[key]

    def victim(self) -> tuple[bytes, bool]:
        """See `EvictionPolicy`."""
        while True:
            if not self._ahead:
                self._ahead, self._passed = self._passed, self._ahead
            key, visited = self._ahead.popitem(last=False)
            if not visited and key != self._newest:
                return key, False
            self._passed[key] = False

    def resize(self, capacity_bytes: int) -> None:
        """See `EvictionPolicy`."""
        self._newest = None

    def __iter__(self) -> Iterator[bytes]:
        """See `EvictionPolicy`."""
        for wanted in (False, True):
            for part in (self._ahead, self._passed):
                yield from (key for key, visited in part.items() if visited is wanted)


_MAKERS: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": Lru,
    "fifo": Fifo,
    "sieve": Sieve,
    "w-tinylfu": WTinyLfu,
}


def make_policy(name: str, capacity_bytes: int) -> EvictionPolicy:
    """The policy of that name (see `POLICIES`), without entries."""
    return _MAKERS[name](capacity_bytes)
