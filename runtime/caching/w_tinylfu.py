"""W-TinyLFU in bytes: an entry comes in when its bytes are asked for more often than those that would have to go.

After Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy" (ACM ToS 2017). A
candidate meets all that must go for it together, as in Einziger, Eytan, Friedman and Manes, "Lightweight Robust
Size Aware Cache Management" (ACM ToS 2022), but requests per byte are compared, not requests:
`load_tests/cache_policies.py` finds that more is kept so, of both, most of all when popularity shifts.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain

_MAX_COUNT = 15
_CELLS_PER_ENTRY = 8
_BITS_PER_ENTRY = 32  # of the doorkeeper: a sample has up to ten times as many keys as there are entries
_SAMPLE_PER_ENTRY = 10
_MIN_ENTRIES = 64
_HALVED = bytes(count >> 1 for count in range(256))

_WINDOW_SHARE = 0.01
_PROTECTED_SHARE = 0.8  # of what is not the window
_MAX_LOSERS = 256  # to one candidate, so that a decision takes bounded time


class FrequencySketch:
    """About how often each key was asked for lately: 1 to 16, or 0; never too few within one sample.

    A count-min sketch behind a doorkeeper, a Bloom filter that keeps what is asked only once from the counters.
    After a sample of ten times as many requests as there are entries, all counts are halved and the doorkeeper is
    emptied, so that what was popular once is not for ever. It grows with the number of entries.
    """

    def __init__(self) -> None:
        self._entries = _MIN_ENTRIES
        self._cells = bytearray(_CELLS_PER_ENTRY * _MIN_ENTRIES)
        self._seen = bytearray(_BITS_PER_ENTRY * _MIN_ENTRIES // 8)
        self._additions = 0

    def fit(self, entries: int) -> None:
        """Be exact enough for so many entries. Places are hashes modulo a power of two, so a twice as long sketch
        that repeats itself says the same of every key."""
        while self._entries < entries:
            self._entries *= 2
            self._cells *= 2
            self._seen *= 2

    def add(self, key: bytes) -> None:
        """Count a request."""
        self._additions += 1
        if self._additions >= _SAMPLE_PER_ENTRY * self._entries:
            self._age()
        if not self._has_entered(key):
            for door in self._doors(key):
                self._seen[door >> 3] |= 1 << (door & 7)
            return
        cells, (a, b, c, d) = self._cells, self._places(key)
        least = min(cells[a], cells[b], cells[c], cells[d])
        if least < _MAX_COUNT:
            for place in (a, b, c, d):
                # Only the lowest: the others are higher than this key's count already.
                if cells[place] == least:
                    cells[place] = least + 1

    def estimate(self, key: bytes) -> int:
        """How often, about."""
        cells, (a, b, c, d) = self._cells, self._places(key)
        return min(cells[a], cells[b], cells[c], cells[d]) + self._has_entered(key)

    def _age(self) -> None:
        self._cells = bytearray(self._cells.translate(_HALVED))
        self._seen = bytearray(len(self._seen))
        self._additions //= 2

    def _places(self, key: bytes) -> tuple[int, int, int, int]:
        digest = hash(key)
        mask, stride = len(self._cells) - 1, digest >> 32 | 1
        return digest & mask, digest + stride & mask, digest + 2 * stride & mask, digest + 3 * stride & mask

    def _doors(self, key: bytes) -> tuple[int, int]:
        digest, mask = hash(key), 8 * len(self._seen) - 1
        return digest & mask, digest >> 24 & mask

    def _has_entered(self, key: bytes) -> int:
        first, second = self._doors(key)
        return self._seen[first >> 3] >> (first & 7) & self._seen[second >> 3] >> (second & 7) & 1


class _Segment:
    """Entries in the order of their use, and the sum of their sizes."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[bytes, int] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self.sizes

    def add(self, key: bytes, size_bytes: int) -> None:
        self.sizes[key] = size_bytes
        self.bytes += size_bytes

    def remove(self, key: bytes) -> int:
        size_bytes = self.sizes.pop(key)
        self.bytes -= size_bytes
        return size_bytes

    def pop_oldest(self) -> tuple[bytes, int]:
        key, size_bytes = self.sizes.popitem(last=False)
        self.bytes -= size_bytes
        return key, size_bytes


class WTinyLfu:
    """New entries pass through a small window, least recently used first. Whoever leaves it is a candidate for the
    main part: while that has room it comes in; else only if it is asked for more often, per byte, than all those
    together that would have to go for it. The main part is a segmented LRU: what is asked for again in probation
    becomes protected. See `EvictionPolicy`.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._sketch = FrequencySketch()
        self._window, self._probation, self._protected = _Segment(), _Segment(), _Segment()
        self._candidates: OrderedDict[bytes, None] = OrderedDict()  # in probation, not decided upon yet
        self._condemned: deque[bytes] = deque()  # lost to a candidate, not named yet

    def added(self, key: bytes, size_bytes: int) -> None:
        """See `EvictionPolicy`."""
        self._sketch.fit(len(self) + 1)
        if size_bytes > _WINDOW_SHARE * self._capacity_bytes:
            self._nominate(key, size_bytes)  # else it would push all others out of the window on its way
        else:
            self._window.add(key, size_bytes)
            self._overflow_window()

    def touched(self, key: bytes) -> None:
        """See `EvictionPolicy`."""
        self._sketch.add(key)
        if key in self._protected:
            self._protected.sizes.move_to_end(key)
        elif key in self._window:
            self._window.sizes.move_to_end(key)
        else:
            self._protected.add(key, self._probation.remove(key))
            self._overflow_protected()

    def missed(self, key: bytes) -> None:
        """See `EvictionPolicy`."""
        self._sketch.add(key)

    def removed(self, key: bytes) -> None:
        """See `EvictionPolicy`."""
        self._segment(key).remove(key)

    def victim(self) -> tuple[bytes, bool]:
        """See `EvictionPolicy`."""
        while self._condemned or self._candidates:
            if self._condemned:
                loser = self._condemned.popleft()
                if loser in self._probation or loser in self._protected:
                    return self._forget(loser), False
            elif (candidate := self._candidates.popitem(last=False)[0]) in self._probation:
                self._condemned.extend(self._worth_less(candidate))
                if not self._condemned:
                    return self._forget(candidate), True
        return self._forget(next(iter(self))), False

    def resize(self, capacity_bytes: int) -> None:
        """See `EvictionPolicy`."""
        self._capacity_bytes = capacity_bytes
        self._overflow_window()
        self._overflow_protected()
        self._candidates.clear()  # fewer bytes are no reason to doubt those from the window
        self._condemned.clear()

    def __iter__(self) -> Iterator[bytes]:
        """See `EvictionPolicy`."""
        return chain(self._probation.sizes, self._protected.sizes, self._window.sizes)

    def __len__(self) -> int:
        return sum(len(segment.sizes) for segment in (self._window, self._probation, self._protected))

    @property
    def _missing_bytes(self) -> int:
        """Of room in the main part. What the window leaves free is not the main part's: it will want it back, and
        then somebody would have to go for a candidate that nobody asked for."""
        main = self._probation.bytes + self._protected.bytes
        return main - self._capacity_bytes + int(_WINDOW_SHARE * self._capacity_bytes)

    def _segment(self, key: bytes) -> _Segment:
        return next(part for part in (self._protected, self._probation, self._window) if key in part)

    def _forget(self, key: bytes) -> bytes:
        self.removed(key)
        return key

    def _overflow_window(self) -> None:
        while self._window.bytes > _WINDOW_SHARE * self._capacity_bytes:
            self._nominate(*self._window.pop_oldest())

    def _nominate(self, key: bytes, size_bytes: int) -> None:
        """Let it into the main part, for as long as nobody needs the room."""
        self._probation.add(key, size_bytes)
        self._candidates[key] = None
        if self._missing_bytes <= 0:
            self._candidates.clear()

    def _overflow_protected(self) -> None:
        limit = _PROTECTED_SHARE * (1 - _WINDOW_SHARE) * self._capacity_bytes
        while self._protected.bytes > limit:
            self._probation.add(*self._protected.pop_oldest())

    def _worth_less(self, candidate: bytes) -> list[bytes]:
        """Those who must go for the candidate, if they are asked for less often than it, per byte; else none."""
        missing = self._missing_bytes
        losers: list[bytes] = []
        lost_bytes = lost_requests = 0
        for key, size_bytes in chain(self._probation.sizes.items(), self._protected.sizes.items()):
            if lost_bytes >= missing or len(losers) == _MAX_LOSERS:
                break
            if key != candidate and key not in self._candidates:
                losers.append(key)
                lost_bytes += size_bytes
                lost_requests += self._sketch.estimate(key)
        won = self._sketch.estimate(candidate) * lost_bytes > lost_requests * self._probation.sizes[candidate]
        return losers if won and lost_bytes >= missing else []
