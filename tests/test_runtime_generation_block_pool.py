"""Who has which block: counted exactly, shared only where the whole prefix is equal, given away in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pimoe.runtime.generation.block_pool import BlockPool, extend_hashes, salt_of

BLOCK = 2


def hashes_of(tokens: Sequence[int], salt: bytes = b"salt", block_tokens: int = BLOCK) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, salt, tokens, block_tokens)
    return hashes


def fill(pool: BlockPool, tokens: Sequence[int]) -> list[int]:
    """The table of a sequence that computed `tokens`; it is not released."""
    hashes = hashes_of(tokens)
    blocks = pool.take(-(-len(tokens) // BLOCK))
    for block, digest in zip(blocks, hashes, strict=False):
        pool.publish(block, digest)
    return blocks


# Hashes.


def test_a_hash_stands_for_the_whole_prefix() -> None:
    first, second = hashes_of([1, 2, 3, 4]), hashes_of([9, 2, 3, 4])
    assert len(first) == 2
    assert not set(first) & set(second), "the second blocks are alike, and what is before them is not"
    assert hashes_of([1, 2, 3, 4, 5]) == first, "what fills no block has no hash"
    assert hashes_of([1, 2])[0] == first[0]
    assert hashes_of([1, 2, 3, 4], block_tokens=4)[0] not in first


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 16])
def test_hashes_are_the_same_however_they_are_extended(block_tokens: int) -> None:
    tokens = list(range(50))
    grown: list[bytes] = []
    for length in range(51):
        extend_hashes(grown, b"s", tokens[:length], block_tokens)
    assert grown == hashes_of(tokens, b"s", block_tokens)
    assert len(grown) == 50 // block_tokens


def test_salts_tell_tenants_and_salts_apart() -> None:
    parts = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc"), ("abc", "")]
    assert len({salt_of(*pair) for pair in parts}) == len(parts)


def test_what_utf8_cannot_carry_is_a_salt_too() -> None:
    """A lone surrogate comes out of JSON as easily as any letter."""
    assert salt_of("\ud800", "") != salt_of("", "\ud800") != salt_of("", "\ud801")


# Holding and taking.


def test_blocks_are_taken_in_rows_and_come_back() -> None:
    pool = BlockPool(5, BLOCK)
    assert pool.take(3) == [1, 2, 3]
    assert pool.take(0) == []
    with pytest.raises(IndexError, match="3 blocks were asked for and 2 are available"):
        pool.take(3)
    pool.release([1, 2, 3])
    assert (pool.available, pool.statistics().free) == (5, 5), "what has no hash is not kept"


def test_a_shared_block_is_held_until_its_last_holder_ends() -> None:
    pool = BlockPool(4, BLOCK)
    table = fill(pool, [1, 2, 3, 4])
    assert pool.kept_among(table) == 0
    pool.hold(table)
    pool.release(table)
    assert pool.statistics().held == 2
    pool.release(table)
    assert pool.statistics()[1:4] == (2, 2, 0)
    assert pool.kept_among(table) == 2


def test_of_two_that_say_the_same_the_first_is_known() -> None:
    pool = BlockPool(4, BLOCK)
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    assert pool.find(hashes_of([1, 2])) == first
    pool.release(second)
    assert pool.statistics().kept == 0
    pool.release(first)
    assert pool.statistics().kept == 1


def test_only_the_unbroken_beginning_is_found() -> None:
    pool = BlockPool(6, BLOCK)
    table = fill(pool, [1, 2, 3, 4, 5, 6])
    assert pool.find(hashes_of([1, 2, 3, 4, 9, 9])) == table[:2]
    assert pool.find(hashes_of([9, 9, 3, 4, 5, 6])) == []
    assert pool.find(hashes_of([1, 2, 3, 4, 5, 6, 7, 8])) == table
    assert pool.find(hashes_of([1, 2, 3, 4, 5, 6], b"another")) == []


def test_the_end_of_a_sequence_is_given_away_before_its_beginning() -> None:
    pool = BlockPool(3, BLOCK)
    table = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.release(table)
    for left in (2, 1, 0):
        assert pool.take(1) == [table[left]]
        assert pool.find(hashes_of([1, 2, 3, 4, 5, 6])) == table[:left]
    assert pool.statistics().evictions == 3


def test_what_was_used_last_is_given_away_last() -> None:
    pool = BlockPool(3, BLOCK)
    tables = [fill(pool, [n, n]) for n in (1, 2, 3)]
    for table in tables:
        pool.release(table)
    pool.hold(tables[0])
    pool.release(tables[0])
    assert [pool.take(1) for _ in tables] == [tables[1], tables[2], tables[0]]


def test_free_blocks_are_taken_before_any_that_is_kept() -> None:
    pool = BlockPool(3, BLOCK)
    pool.release(fill(pool, [1, 2]))
    assert pool.take(2) == [2, 3]
    assert pool.find(hashes_of([1, 2])) == [1]


def test_nothing_is_kept_where_prefixes_are_not_reused() -> None:
    pool = BlockPool(3, BLOCK, reuse_prefixes=False)
    pool.release(fill(pool, [1, 2]))
    assert pool.find(hashes_of([1, 2])) == []
    assert pool.statistics()[1:4] == (3, 0, 0)


def test_distrusted_blocks_are_found_by_nobody() -> None:
    pool = BlockPool(5, BLOCK)
    kept, held = fill(pool, [1, 2, 3, 4]), fill(pool, [5, 6])
    pool.release(kept)
    pool.distrust([kept[1], *held])
    assert pool.find(hashes_of([1, 2, 3, 4])) == kept[:1]
    assert pool.find(hashes_of([5, 6])) == []
    assert pool.statistics()[1:4] == (3, 1, 1)
    pool.release(held)
    pool.distrust(held)
    assert pool.statistics()[1:4] == (4, 1, 0)


def test_lookups_are_counted() -> None:
    pool = BlockPool(3, BLOCK)
    pool.count_lookup(10, 4)
    pool.count_lookup(3, 0)
    assert pool.statistics()[4:6] == (13, 4)


# Against a model that is too simple to be wrong.


@dataclass(eq=False)
class Sequence_:
    salt: bytes
    tokens: list[int]
    blocks: list[int]
    computed: int = 0
    hashes: list[bytes] = field(default_factory=list)


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow and end. The model says of every block who holds it and what it is known to say."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, BLOCK)
        self.free = set(range(1, 7))
        self.kept: list[int] = []  # the longest unused first
        self.holders: Counter[int] = Counter()
        self.known: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self.sequences: list[Sequence_] = []
        self.evictions = 0

    def says(self, sequence: Sequence_, place: int) -> tuple[bytes, tuple[int, ...]]:
        return sequence.salt, tuple(sequence.tokens[: (place + 1) * BLOCK])

    def is_known(self, block: int) -> bool:
        return block in self.known.values()

    def unlearn(self, block: int) -> None:
        self.known = {said: held for said, held in self.known.items() if held != block}

    def expect_taken(self, count: int) -> list[int]:
        expected = []
        for _ in range(count):
            if self.free:
                block = min(self.free)
                self.free.remove(block)
            else:
                block = self.kept.pop(0)
                self.unlearn(block)
                self.evictions += 1
            self.holders[block] = 1
            expected.append(block)
        return expected

    @rule(salt=st.sampled_from([b"a", b"b"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, salt: bytes, tokens: list[int]) -> None:
        sequence = Sequence_(salt, tokens, [])
        extend_hashes(sequence.hashes, salt, tokens, BLOCK)
        found = self.pool.find(sequence.hashes)
        expected = []
        for place in range(len(tokens) // BLOCK):
            if (block := self.known.get(self.says(sequence, place))) is None:
                break
            expected.append(block)
        assert found == expected, "the longest beginning that is known, and nothing else"
        needed = -(-len(tokens) // BLOCK) - len(found)
        waking = [block for block in found if block in self.kept]
        assert self.pool.kept_among(found) == len(waking)
        if needed + len(waking) > len(self.free) + len(self.kept):
            return
        self.pool.hold(found)
        for block in found:
            self.holders[block] += 1
        self.kept = [block for block in self.kept if block not in waking]
        taken = self.pool.take(needed)
        assert taken == self.expect_taken(needed)
        sequence.blocks = [*found, *taken]
        sequence.computed = len(found)
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        """A sequence fills its next block."""
        sequence = data.draw(st.sampled_from(self.sequences))
        place = sequence.computed
        if place >= len(sequence.tokens) // BLOCK:
            return
        block = sequence.blocks[place]
        self.pool.publish(block, sequence.hashes[place])
        sequence.computed += 1
        if self.says(sequence, place) not in self.known and not self.is_known(block):
            self.known[self.says(sequence, place)] = block

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        grown = [*sequence.tokens, *tokens]
        needed = max(0, -(-len(grown) // BLOCK) - len(sequence.blocks))
        if needed > len(self.free) + len(self.kept):
            with pytest.raises(IndexError):
                self.pool.take(needed)
            return
        taken = self.pool.take(needed)
        assert taken == self.expect_taken(needed)
        sequence.blocks += taken
        sequence.tokens = grown
        extend_hashes(sequence.hashes, sequence.salt, grown, BLOCK)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.pool.release(sequence.blocks)
        for block in reversed(sequence.blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                if self.is_known(block):
                    self.kept.append(block)
                else:
                    self.free.add(block)

    @rule(block=st.integers(1, 6))
    def distrust(self, block: int) -> None:
        self.pool.distrust([block])
        self.unlearn(block)
        if block in self.kept:
            self.kept.remove(block)
            self.free.add(block)

    @invariant()
    def the_books_agree(self) -> None:
        statistics = self.pool.statistics()
        held = {block for sequence in self.sequences for block in sequence.blocks}
        counted = Counter(block for sequence in self.sequences for block in sequence.blocks)
        assert +self.holders == counted
        assert (statistics.free, statistics.kept, statistics.held) == (
            len(self.free),
            len(self.kept),
            len(held),
        )
        assert statistics.total == 6 == statistics.free + statistics.kept + statistics.held
        assert statistics.evictions == self.evictions
        assert self.pool.available == len(self.free) + len(self.kept)
        assert not held & (self.free | set(self.kept)), "no block is had twice"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
