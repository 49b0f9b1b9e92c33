"""The eviction policies, each against a naive model of it that is slow and obvious."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.caching.eviction import POLICIES, Sieve, make_policy
from pimoe.runtime.caching.w_tinylfu import FrequencySketch, WTinyLfu

CAPACITY = 1000
NAMES = "abcdefghijkl"


class NaiveQueue:
    """FIFO and LRU: a list, oldest first."""

    def __init__(self, moves: bool) -> None:
        self.order: list[str] = []
        self.moves = moves

    def touch(self, name: str) -> None:
        if self.moves:
            self.order.remove(name)
            self.order.append(name)

    def evict(self) -> str:
        return self.order.pop(0)

    def add(self, name: str) -> None:
        self.order.append(name)

    def remove(self, name: str) -> None:
        self.order.remove(name)


class NaiveSieve(NaiveQueue):
    """The paper's pseudocode: a hand over a list, from the tail (0) to the head."""

    def __init__(self) -> None:
        super().__init__(False)
        self.visited: set[str] = set()
        self.hand = 0

    def touch(self, name: str) -> None:
        self.visited.add(name)

    def evict(self) -> str:
        while True:
            if self.hand >= len(self.order):
                self.hand = 0
            name = self.order[self.hand]
            if name not in self.visited:
                return self.order.pop(self.hand)  # the hand is at the next newer one now
            self.visited.discard(name)
            self.hand += 1

    def remove(self, name: str) -> None:
        self.visited.discard(name)
        self.hand -= self.order.index(name) < self.hand
        self.order.remove(name)


NAIVE = {"fifo": lambda: NaiveQueue(False), "lru": lambda: NaiveQueue(True), "sieve": NaiveSieve}
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "forget"]), st.sampled_from(NAMES), st.integers(1, 600)),
    max_size=120,
)


@pytest.mark.parametrize("name", list(NAIVE))
@given(actions=ACTIONS)
def test_who_goes_is_who_goes_in_the_naive_model(name: str, actions: list[tuple[str, str, int]]) -> None:
    policy, naive = make_policy(name, CAPACITY), NAIVE[name]()
    sizes: dict[str, int] = {}
    for action, key, size in actions:
        if action == "forget":
            if sizes.pop(key, None) is not None:
                policy.removed(key.encode())
                naive.remove(key)
        elif key in sizes:
            policy.touched(key.encode())
            naive.touch(key)
        else:
            policy.missed(key.encode())
            policy.added(key.encode(), size)
            while sum(sizes.values()) + size > CAPACITY:
                victim = naive.evict()
                assert policy.victim() == (victim.encode(), False)
                del sizes[victim]
            naive.add(key)
            sizes[key] = size
        assert sorted(policy) == sorted(key.encode() for key in sizes)


class ExactCounts:
    """A sketch that makes no mistakes and forgets nothing."""

    def __init__(self) -> None:
        self.counts: Counter[bytes] = Counter()

    def fit(self, entries: int) -> None:
        """See `FrequencySketch`."""

    def add(self, key: bytes) -> None:
        """See `FrequencySketch`."""
        self.counts[key] += 1

    def estimate(self, key: bytes) -> int:
        """See `FrequencySketch`."""
        return self.counts[key]


class NaiveWTinyLfu:
    """Three lists of names, oldest first, and sums over them wherever a sum is needed."""

    def __init__(self) -> None:
        self.window: list[str] = []
        self.probation: list[str] = []
        self.protected: list[str] = []
        self.sizes: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self.candidates: list[str] = []
        self.condemned: list[str] = []  # go as soon as room is needed, which may be later
        self.refused: list[str] = []

    def bytes(self, names: list[str]) -> int:
        return sum(self.sizes[name] for name in names)

    def ask(self, name: str, size: int) -> None:
        self.counts[name] += 1
        for segment in (self.window, self.protected):
            if name in segment:
                segment.append(segment.pop(segment.index(name)))
                return
        if name in self.probation:
            self.probation.remove(name)
            self.protected.append(name)
            while self.bytes(self.protected) > 0.8 * 0.99 * CAPACITY:
                self.probation.append(self.protected.pop(0))
            return
        self.sizes[name] = size
        self.window.append(name)
        if size > CAPACITY // 100:
            self.window.remove(name)
            self._nominate(name)
        self._decide()

    def forget(self, name: str) -> None:
        for segment in (self.window, self.probation, self.protected):
            if name in segment:
                segment.remove(name)
        del self.sizes[name]

    def _decide(self) -> None:
        while self.bytes(self.window) > 0.01 * CAPACITY:
            self._nominate(self.window.pop(0))
        while sum(self.sizes.values()) > CAPACITY:
            self.condemned = [name for name in self.condemned if name in self.probation + self.protected]
            if self.condemned:
                self.forget(self.condemned.pop(0))
                continue
            self.candidates = [name for name in self.candidates if name in self.probation]
            candidate = self.candidates.pop(0)
            others = [name for name in self.probation + self.protected if name not in self.candidates]
            others.remove(candidate)
            losers: list[str] = []
            while others and self._excess() > self.bytes(losers):
                losers.append(others.pop(0))
            enough = self._excess() <= self.bytes(losers)
            requests = sum(self.counts[name] for name in losers)
            if enough and self.counts[candidate] / self.sizes[candidate] > requests / self.bytes(losers):
                self.condemned = losers
            else:
                self.forget(candidate)
                self.refused.append(candidate)

    def _nominate(self, name: str) -> None:
        self.probation.append(name)
        self.candidates = [*self.candidates, name] if self._excess() > 0 else []

    def _excess(self) -> int:
        return self.bytes(self.probation) + self.bytes(self.protected) - (CAPACITY - CAPACITY // 100)


@given(actions=ACTIONS)
def test_w_tinylfu_holds_what_the_naive_model_holds(actions: list[tuple[str, str, int]]) -> None:
    # Sizes up to ten would all stay in the window; it is the larger ones that are decided upon.
    policy, naive, refused = WTinyLfu(CAPACITY), NaiveWTinyLfu(), []
    counts: Any = ExactCounts()
    policy._sketch = counts
    held: dict[str, int] = {}
    for action, key, size in actions:
        size = size % 8 + 1 if key in "abcd" else size
        if action == "forget":
            if held.pop(key, None) is not None:
                policy.removed(key.encode())
                naive.forget(key)
        elif key in held:
            policy.touched(key.encode())
            naive.ask(key, 0)
        else:
            policy.missed(key.encode())
            policy.added(key.encode(), size)
            held[key] = size
            while sum(held.values()) > CAPACITY:
                victim, was_refused = policy.victim()
                del held[victim.decode()]
                refused += [victim.decode()] if was_refused else []
            naive.ask(key, size)
        assert held == naive.sizes
        assert list(policy) == [name.encode() for name in naive.probation + naive.protected + naive.window]
    assert refused == naive.refused


def test_sieve_never_names_what_room_is_made_for() -> None:
    policy = Sieve()
    for name in (b"a", b"b"):
        policy.added(name, 1)
        policy.touched(name)
    policy.added(b"c", 1)
    assert policy.victim() == (b"a", False)
    policy.resize(0)
    assert sorted(policy.victim()[0] for _ in range(2)) == [b"b", b"c"]


def test_w_tinylfu_keeps_what_is_asked_for_often_through_a_scan() -> None:
    policy = WTinyLfu(100)
    popular = [b"popular %d" % i for i in range(80)]
    for _ in range(3):
        for key in popular:
            if key in set(policy):
                policy.touched(key)
            else:
                policy.missed(key)
                policy.added(key, 1)
    held = 80
    for i in range(200):
        key = b"scan %d" % i
        policy.missed(key)
        policy.added(key, 1)
        held += 1
        while held > 100:
            policy.victim()
            held -= 1
    assert len(set(popular) & set(policy)) >= 78  # the sketch may mistake one


@pytest.mark.parametrize(("requests", "admitted"), [(1, False), (2, False), (3, True)])
def test_w_tinylfu_compares_requests_per_byte(requests: int, admitted: bool) -> None:
    policy = WTinyLfu(10)
    counts: Any = ExactCounts()
    policy._sketch = counts
    for name in (b"a", b"b"):
        policy.missed(name)
        policy.added(name, 5)
    for _ in range(requests):
        policy.missed(b"large")
    policy.added(b"large", 10)
    if admitted:
        assert [policy.victim(), policy.victim()] == [(b"a", False), (b"b", False)]
        assert list(policy) == [b"large"]
    else:
        assert policy.victim() == (b"large", True)
        assert list(policy) == [b"a", b"b"]


def test_one_candidate_does_not_displace_thousands() -> None:
    policy = WTinyLfu(10_000)
    for i in range(10_000):
        policy.added(b"%d" % i, 1)
    for _ in range(10):
        policy.missed(b"large")
    policy.added(b"large", 9000)
    assert set(policy) >= {b"%d" % i for i in range(10_000)}
    assert policy.victim() == (b"large", True)


@pytest.mark.parametrize("name", POLICIES)
def test_everyone_goes_in_the_end(name: str) -> None:
    policy = make_policy(name, 20)
    for i in range(20):
        policy.added(b"%d" % i, 1)
        policy.touched(b"%d" % (i // 2))
    policy.resize(0)
    assert sorted(policy.victim()[0] for _ in range(20)) == sorted(b"%d" % i for i in range(20))
    assert list(policy) == []


# The sketch ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), max_size=300))
def test_the_sketch_never_says_too_few(asked: list[int]) -> None:
    sketch = FrequencySketch()
    for key in asked:
        sketch.add(b"%d" % key)
    for key, count in Counter(asked).items():
        assert sketch.estimate(b"%d" % key) >= min(count, 16)


def test_the_sketch_is_seldom_wrong() -> None:
    sketch = FrequencySketch()
    sketch.fit(1000)
    for i in range(5000):
        sketch.add(b"%d" % (i % 1000))
    wrong = sum(sketch.estimate(b"%d" % i) != 5 for i in range(1000))
    unknown = sum(sketch.estimate(b"other %d" % i) > 1 for i in range(1000))
    assert wrong < 50
    assert unknown < 50


def test_the_sketch_forgets() -> None:
    sketch = FrequencySketch()
    for _ in range(16):
        sketch.add(b"old")
    assert sketch.estimate(b"old") == 16
    for i in range(640):
        sketch.add(b"%d" % (i % 3))
    assert sketch.estimate(b"old") <= 8
    for i in range(4 * 640):
        sketch.add(b"%d" % (i % 3))
    assert sketch.estimate(b"old") <= 1


def test_the_sketch_says_the_same_after_growing() -> None:
    sketch = FrequencySketch()
    for i in range(300):
        sketch.add(b"%d" % (i % 40))
    before = [sketch.estimate(b"%d" % i) for i in range(60)]
    sketch.fit(5000)
    assert [sketch.estimate(b"%d" % i) for i in range(60)] == before
