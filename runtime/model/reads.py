"""How attention reads the paged cache in one forward, computed once for all layers of one sliding window.

The cache is read once for all decoding sequences of about the same length, so that none pays for the longest, and
once for each sequence in prefill; or, for batch invariance, in tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kv_cache import NULL_BLOCK, BlockRead
from .tiles import TILE_ROWS

# Tokens that one read gathers for decoding sequences: what still lies in a processor's cache when it is used.
_GATHERED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` new tokens of the sequence whose keys and values lie in `blocks`, of which `start` are cached
    already. The blocks are enough for all of them."""

    blocks: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        """The sequence's length after the forward."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class DecodeRead:
    """Attention of several one-token segments at once.

    Attributes:
        rows: their rows in the batch; a slice where they lie side by side.
        read: what is read of the cache.
        mask: additive `[sequences, 1, 1, length]`, or None where every sequence sees all of it.
    """

    rows: Tensor | slice
    read: BlockRead
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRead:
    """Attention of one longer segment.

    Attributes:
        rows: its rows in the batch.
        read: what is read of the cache; None where the new tokens see only each other, and each itself and those
            before it.
        mask: additive `[count, length]`; None where `read` is.
    """

    rows: slice
    read: BlockRead | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class TileRead:
    """Attention in tiles of `TILE_ROWS` positions, each computed in one shape whichever of them are new.

    Attributes:
        rows: `[new]` their rows in the batch.
        places: `[new]` where in the tiles they are.
        read: what is read of the cache, a sequence of blocks for each tile.
        mask: additive `[tiles, 1, TILE_ROWS, length]`.
    """

    rows: Tensor
    places: Tensor
    read: BlockRead
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Reads:
    """How the layers of one sliding window read the cache in this forward."""

    decode: tuple[DecodeRead, ...] = ()
    prefill: tuple[PrefillRead, ...] = ()
    tiles: tuple[TileRead, ...] = ()

    @property
    def all(self) -> tuple[DecodeRead | PrefillRead | TileRead, ...]:
        """All kinds."""
        return (*self.decode, *self.prefill, *self.tiles)

    @property
    def only(self) -> DecodeRead | PrefillRead | TileRead | None:
        """The one read that covers the whole batch in its order, if there is one."""
        reads = self.all
        return reads[0] if len(reads) == 1 and isinstance(reads[0].rows, slice) else None


@dataclass(frozen=True, slots=True)
class ReadPlanner:
    """Plans reads."""

    block_tokens: int
    dtype: torch.dtype
    device: torch.device

    def plan(self, rows: Sequence[tuple[Segment, int]], window: int | None) -> Reads:
        """For segments and the rows of the batch where each begins."""
        single = [(segment, row) for segment, row in rows if segment.count == 1]
        longer = [(segment, row) for segment, row in rows if segment.count > 1]
        return Reads(
            tuple(self._decode(bucket, window) for bucket in self._buckets(single, window)),
            tuple(self._prefill(segment, row, window) for segment, row in longer),
        )

    def plan_tiles(self, rows: Sequence[tuple[Segment, int]], window: int | None) -> Reads:
        """By the number of blocks that a tile reads, which depends on its position alone."""
        sized: dict[int, list[tuple[Segment, int, int]]] = {}
        for segment, row in rows:
            for tile in range(segment.start // TILE_ROWS, (segment.end - 1) // TILE_ROWS + 1):
                first, stop = self._tile_span(tile, window)
                sized.setdefault(stop - first, []).append((segment, row, tile))
        reads = []
        for blocks, tiles in sized.items():
            at_once = max(1, _GATHERED_TOKENS // (blocks * self.block_tokens)) if self.device.type == "cpu" else 1
            reads += [
                self._tiles(tiles[start : start + at_once], window) for start in range(0, len(tiles), at_once)
            ]
        return Reads(tiles=tuple(reads))

    def _tile_span(self, tile: int, window: int | None) -> tuple[int, int]:
        start, end = tile * TILE_ROWS, (tile + 1) * TILE_ROWS
        first = 0 if window is None else max(0, start + 1 - window) // self.block_tokens
        return first, -(-end // self.block_tokens)

    def _tiles(self, tiles: Sequence[tuple[Segment, int, int]], window: int | None) -> TileRead:
        rows, places, tables, ends = [], [], [], []
        for number, (segment, row, tile) in enumerate(tiles):
            start = tile * TILE_ROWS
            fresh = range(max(segment.start, start), min(segment.end, start + TILE_ROWS))
            rows += [row + position - segment.start for position in fresh]
            places += [number * TILE_ROWS + position - start for position in fresh]
            first, stop = self._tile_span(tile, window)
            tables.append([*segment.blocks[first:stop]])
            ends.append(start - first * self.block_tokens)
        blocks = stop - first
        length = blocks * self.block_tokens
        seen = torch.tensor(ends)[:, None, None] + torch.arange(1, TILE_ROWS + 1)[:, None]
        mask = self._mask(seen, length, window)[:, None]
        index = self._index(tables, blocks)
        read = BlockRead(len(tables), blocks, length, index)
        return TileRead(
            torch.tensor(rows, device=self.device), torch.tensor(places, device=self.device), read, mask
        )

    def _span(self, segment: Segment, window: int | None) -> tuple[int, int]:
        """The first block that any new token of a segment sees, and the one behind the last."""
        first = 0 if window is None else max(0, segment.start + 1 - window) // self.block_tokens
        return first, -(-segment.end // self.block_tokens)

    def _buckets(
        self, rows: list[tuple[Segment, int]], window: int | None
    ) -> list[list[tuple[Segment, int, int, int]]]:
        """Segments and rows, with the first block and the number of blocks that each reads, in groups of which
        none reads more than twice what its shortest needs."""
        spans = [(segment, row, *self._span(segment, window)) for segment, row in rows]
        sized = sorted(
            ((segment, row, first, stop - first) for segment, row, first, stop in spans), key=lambda item: item[3]
        )
        buckets: list[list[tuple[Segment, int, int, int]]] = []
        for item in sized:
            bucket = buckets[-1] if buckets else None
            tokens = item[3] * self.block_tokens
            if bucket and item[3] <= 2 * bucket[0][3] and (len(bucket) + 1) * tokens <= _GATHERED_TOKENS:
                bucket.append(item)
            else:
                buckets.append([item])
        for bucket in buckets:
            bucket.sort(key=lambda item: item[1])
        return buckets

    def _decode(self, bucket: list[tuple[Segment, int, int, int]], window: int | None) -> DecodeRead:
        blocks = max(count for _, _, _, count in bucket)
        tables = [[*segment.blocks[first : first + count]] for segment, _, first, count in bucket]
        ends = [segment.end - first * self.block_tokens for segment, _, first, _ in bucket]
        length = max(ends)
        read = self._read(tables, blocks, length)
        mask = None
        if window is not None or min(ends) != length:
            mask = self._mask(torch.tensor(ends)[:, None], length, window)[:, None, None]
        return DecodeRead(_as_slice([row for _, row, _, _ in bucket], self.device), read, mask)

    def _prefill(self, segment: Segment, row: int, window: int | None) -> PrefillRead:
        rows = slice(row, row + segment.count)
        if segment.start == 0 and (window is None or segment.count <= window):
            return PrefillRead(rows, None, None)
        first, stop = self._span(segment, window)
        skipped = first * self.block_tokens
        read = self._read([list(segment.blocks[first:stop])], stop - first, segment.end - skipped)
        ends = torch.arange(segment.start + 1 - skipped, segment.end + 1 - skipped)[:, None]
        return PrefillRead(rows, read, self._mask(ends, read.length, window))

    def _read(self, tables: list[list[int]], blocks: int, length: int) -> BlockRead:
        if len(tables) == 1 and tables[0] == list(range(tables[0][0], tables[0][0] + blocks)):
            return BlockRead(1, blocks, length, None, tables[0][0])
        return BlockRead(len(tables), blocks, length, self._index(tables, blocks))

    def _index(self, tables: list[list[int]], blocks: int) -> Tensor:
        index = np.full((len(tables), blocks), NULL_BLOCK)
        for row, table in zip(index, tables, strict=True):
            row[: len(table)] = table
        return torch.from_numpy(index.ravel()).to(self.device)

    def _mask(self, ends: Tensor, length: int, window: int | None) -> Tensor:
        """Additive mask `[rows, length]`: a row whose sequence ends at `ends` sees what lies before that, and of
        it no more than `window` tokens."""
        positions = torch.arange(length)
        hidden = positions >= ends
        if window is not None:
            hidden |= positions < ends - window
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf).to(self.device)


def _as_slice(rows: list[int], device: torch.device) -> Tensor | slice:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)
