"""One forward's batch, and everything about it that all layers share, computed once.

A batch is ragged: sequences that decode bring one token, those in prefill bring many. Linear layers see the
flat list of tokens. Attention reads the cache once for all decoding sequences of about the same length, so that
none pays for the longest, and once for each sequence in prefill.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kv_cache import NULL_BLOCK, BlockRead

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
class ForwardBatch:
    """New tokens of several sequences.

    Attributes:
        token_ids: `[tokens]` int64, segment after segment. Ids must be below the vocabulary size.
        segments: at least one, each of a sequence of its own.
        output_rows: `[outputs]` int64 rows of `token_ids` whose logits are wanted, possibly none; None for the
            last row of each segment.

    Raises:
        ValueError: the segments do not add up to the tokens, or one is empty.
    """

    token_ids: Tensor
    segments: tuple[Segment, ...]
    output_rows: Tensor | None = None

    def __post_init__(self) -> None:
        counts = [segment.count for segment in self.segments]
        if not counts or min(counts) < 1 or sum(counts) != self.token_ids.shape[0]:
            raise ValueError(f"{self.token_ids.shape[0]} tokens cannot make segments of {counts}")


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
class Reads:
    """How the layers of one sliding window read the cache in this forward."""

    decode: tuple[DecodeRead, ...]
    prefill: tuple[PrefillRead, ...]

    @property
    def all(self) -> tuple[DecodeRead | PrefillRead, ...]:
        """Both kinds."""
        return (*self.decode, *self.prefill)

    @property
    def only(self) -> DecodeRead | PrefillRead | None:
        """The one read that covers the whole batch in its order, if there is one."""
        reads = self.all
        return reads[0] if len(reads) == 1 and isinstance(reads[0].rows, slice) else None


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers share in one forward.

    Attributes:
        positions: `[tokens]` int64 within each sequence.
        cache_rows: `[tokens]` int64, where each token's key and value go (see `KVCache.append`).
        output_rows: `[outputs]` int64.
        reads: by the layers' sliding window.
        length: the longest sequence after the forward.
    """

    positions: Tensor
    cache_rows: Tensor
    output_rows: Tensor
    reads: dict[int | None, Reads]
    length: int


def plan_step(
    batch: ForwardBatch,
    block_tokens: int,
    windows: Collection[int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Step:
    """Everything about `batch` that all layers share.

    Args:
        batch: the new tokens.
        block_tokens: tokens of a block of the cache.
        windows: the sliding windows that occur in the model.
        dtype: of queries and keys, and so of the masks.
        device: where the tensors go.
    """
    segments = batch.segments
    counts = np.array([segment.count for segment in segments])
    ends = counts.cumsum()
    positions = np.concatenate([np.arange(segment.start, segment.end) for segment in segments])
    blocks = np.concatenate([_blocks_of(segment, block_tokens) for segment in segments])
    outputs = torch.from_numpy(ends - 1) if batch.output_rows is None else batch.output_rows
    rows = [(segment, row) for segment, row in zip(segments, (ends - counts).tolist(), strict=True)]
    planner = _Planner(block_tokens, dtype, device)
    return Step(
        positions=torch.from_numpy(positions).to(device),
        cache_rows=torch.from_numpy(blocks * block_tokens + positions % block_tokens).to(device),
        output_rows=outputs.to(device),
        reads={window: planner.plan(rows, window) for window in windows},
        length=max(segment.end for segment in segments),
    )


def _blocks_of(segment: Segment, block_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The block that each new token goes to."""
    if segment.count == 1:
        return np.array([segment.blocks[segment.start // block_tokens]])
    first, last = segment.start // block_tokens, (segment.end - 1) // block_tokens
    spread = np.repeat(np.array(segment.blocks[first : last + 1]), block_tokens)
    skipped = segment.start - first * block_tokens
    return spread[skipped : skipped + segment.count]


@dataclass(frozen=True, slots=True)
class _Planner:
    block_tokens: int
    dtype: torch.dtype
    device: torch.device

    def plan(self, rows: Sequence[tuple[Segment, int]], window: int | None) -> Reads:
        single = [(segment, row) for segment, row in rows if segment.count == 1]
        longer = [(segment, row) for segment, row in rows if segment.count > 1]
        return Reads(
            tuple(self._decode(bucket, window) for bucket in self._buckets(single, window)),
            tuple(self._prefill(segment, row, window) for segment, row in longer),
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
        index = np.full((len(tables), blocks), NULL_BLOCK)
        for row, table in zip(index, tables, strict=True):
            row[: len(table)] = table
        return BlockRead(len(tables), blocks, length, torch.from_numpy(index.ravel()).to(self.device))

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
