"""Who has which block of the paged KV cache. Pure accounting: no tensors, no clock.

A block is free, or held by one or more sequences, or *kept*: nobody holds it, but what it says is known, so that
the next sequence that begins alike takes it instead of computing it again. Kept blocks are given away when no free
one is left, the one unused for longest first.

A full block is known by a hash of its tokens and of all before them (as vLLM's prefix cache), beginning with a
salt: equal prefixes of different salts share nothing.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import NamedTuple


class BlockStatistics(NamedTuple):
    """Blocks now: all, free, kept, held. Since start: prompt tokens looked up and found, kept blocks given
    away."""

    total: int
    free: int
    kept: int
    held: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    evictions: int


def salt_of(tenant: str, cache_salt: str) -> bytes:
    """Where the chain of hashes of a request begins."""
    # JSON may hold lone surrogates, which UTF-8 cannot carry otherwise.
    parts = tenant.encode(errors="surrogatepass"), cache_salt.encode(errors="surrogatepass")
    return hashlib.blake2b(struct.pack("<Q", len(parts[0])) + b"".join(parts), digest_size=16).digest()


def extend_hashes(hashes: list[bytes], salt: bytes, tokens: Sequence[int], block_tokens: int) -> None:
    """Appends the hashes of those full blocks of `tokens` that `hashes` lacks. 128 bits of BLAKE2b: nobody finds
    two prefixes of one hash."""
    for start in range(len(hashes) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        before = hashes[-1] if hashes else salt
        block = struct.pack(f"<{block_tokens}q", *tokens[start : start + block_tokens])
        hashes.append(hashlib.blake2b(before + block, digest_size=16).digest())


class BlockPool:
    """Blocks 1 to `num_blocks`.

    Args:
        num_blocks: how many there are.
        block_tokens: tokens of each.
        reuse_prefixes: whether blocks that nobody holds are kept for equal prefixes.
    """

    def __init__(self, num_blocks: int, block_tokens: int, reuse_prefixes: bool = True) -> None:
        self.num_blocks, self.block_tokens, self.reuse_prefixes = num_blocks, block_tokens, reuse_prefixes
        # The lowest first: a sequence that gets many at once then mostly gets a row of neighbours.
        self._free = list(range(1, num_blocks + 1))
        self._holders = [0] * (num_blocks + 1)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._queries = self._hits = self._evictions = 0

    @property
    def available(self) -> int:
        """Blocks that can be had: free and kept ones."""
        return len(self._free) + len(self._kept)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `hashes`. They are not held yet."""
        found: list[int] = []
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def count_lookup(self, tokens: int, found: int) -> None:
        """Enters a lookup of a prompt of `tokens` in the statistics."""
        self._queries += tokens
        self._hits += found

    def kept_among(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds: holding them makes so many fewer available."""
        return sum(not self._holders[block] for block in blocks)

    def would_free(self, blocks: Sequence[int], gone: Counter[int]) -> list[int]:
        """Which of these blocks nobody would hold if their sequence let go of them, after others let go of `gone`;
        enters them there."""
        gone.update(blocks)
        return [block for block in blocks if gone[block] == self._holders[block]]

    def hold(self, blocks: Sequence[int]) -> None:
        """One more sequence holds these blocks, which are known."""
        for block in blocks:
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """So many blocks of nobody, held now; what they held is to be cleared.

        Raises:
            IndexError: fewer than `count` are available, as the caller must have seen.
        """
        if count > self.available:
            raise IndexError(f"{count} blocks were asked for and {self.available} are available")
        taken = [heapq.heappop(self._free) if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def publish(self, block: int, digest: bytes) -> None:
        """A held block is full, and this is its hash. Of two with one hash the first is known."""
        if self.reuse_prefixes and digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence does not hold these blocks, which are its table, any more."""
        # The end of a sequence is given away before its beginning, without which it is of no use.
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._hash_of:
                self._kept[block] = None
            else:
                heapq.heappush(self._free, block)

    def distrust(self, blocks: Sequence[int]) -> None:
        """What these blocks hold is wrong, as of a sequence whose logits are not finite: nobody finds them any
        more. Who holds them still does."""
        for block in blocks:
            if (digest := self._hash_of.pop(block, None)) is None:
                continue
            del self._block_of[digest]
            if block in self._kept:
                del self._kept[block]
                heapq.heappush(self._free, block)

    def statistics(self) -> BlockStatistics:
        """See `BlockStatistics`."""
        free, kept = len(self._free), len(self._kept)
        held = self.num_blocks - free - kept
        return BlockStatistics(self.num_blocks, free, kept, held, self._queries, self._hits, self._evictions)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        self._evictions += 1
        return block
