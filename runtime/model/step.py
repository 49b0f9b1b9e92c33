"""One forward's batch, and everything about it that all layers share, computed once.

A batch is ragged: sequences that decode bring one token, those in prefill bring many. Linear layers see the flat
list of tokens; how attention reads the cache is in `reads`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..native.trunk import AttendedTokens, TokenPlaces
from .reads import ReadPlanner, Reads, Segment
from .rope import RotaryTable
from .tiles import Rows, by_tiles

__all__ = ["ForwardBatch", "Segment", "Step", "plan_step"]


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
class NativeStep:
    """What native kernels need to know of a forward.

    Attributes:
        places: of all new tokens.
        attended: the tokens that attend one by one, or None without any.
        kept: what the addresses in `places` point at.
    """

    places: TokenPlaces
    attended: AttendedTokens | None
    kept: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers share in one forward.

    Attributes:
        positions: `[tokens]` int64 within each sequence.
        cache_rows: `[tokens]` int64, where each token's key and value go (see `KVCache.append`).
        output_rows: `[outputs]` int64.
        reads: by the layers' sliding window.
        length: the longest sequence after the forward.
        in_tiles: whether rows are computed in tiles; see `by_rows`.
        native: set where native kernels compute attention; `reads` are then of prompts only.
    """

    positions: Tensor
    cache_rows: Tensor
    output_rows: Tensor
    reads: dict[int | None, Reads]
    length: int
    in_tiles: bool = False
    native: NativeStep | None = None

    def by_rows(self, function: Callable[..., Rows], *rows: Tensor) -> Rows:
        """`function(*rows)`, which treats each row on its own."""
        return by_tiles(function, *rows) if self.in_tiles else function(*rows)


def plan_step(
    batch: ForwardBatch,
    block_tokens: int,
    windows: Collection[int | None],
    dtype: torch.dtype,
    device: torch.device,
    in_tiles: bool = False,
    rotary: RotaryTable | None = None,
) -> Step:
    """Everything about `batch` that all layers share.

    Args:
        batch: the new tokens.
        block_tokens: tokens of a block of the cache.
        windows: the sliding windows that occur in the model.
        dtype: of queries and keys, and so of the masks.
        device: where the tensors go.
        in_tiles: whether rows and attention are computed in tiles.
        rotary: set where native kernels compute attention.
    """
    segments = batch.segments
    counts = np.array([segment.count for segment in segments])
    ends = counts.cumsum()
    positions = np.concatenate([np.arange(segment.start, segment.end) for segment in segments])
    blocks = np.concatenate([_blocks_of(segment, block_tokens) for segment in segments])
    outputs = torch.from_numpy(ends - 1) if batch.output_rows is None else batch.output_rows
    rows = [(segment, row) for segment, row in zip(segments, (ends - counts).tolist(), strict=True)]
    planner = ReadPlanner(block_tokens, dtype, device)
    length = max(segment.end for segment in segments)
    placed = torch.from_numpy(positions).to(device)
    cache_rows = torch.from_numpy(blocks * block_tokens + positions % block_tokens).to(device)
    native = None
    if rotary is not None:
        # Where every token is to have the same bits in any batch, those of prompts attend one by one too.
        alone = rows if in_tiles else [(segment, row) for segment, row in rows if segment.count == 1]
        rows = [] if in_tiles else [(segment, row) for segment, row in rows if segment.count > 1]
        places = TokenPlaces(
            len(positions), placed.data_ptr(), cache_rows.data_ptr(), rotary.address(length), block_tokens
        )
        attended = AttendedTokens.of([(s.blocks, row, s.count) for s, row in alone]) if alone else None
        native = NativeStep(places, attended, (placed, cache_rows, rotary.table))
    return Step(
        positions=placed,
        cache_rows=cache_rows,
        output_rows=outputs.to(device),
        reads={
            window: planner.plan_tiles(rows, window) if in_tiles and native is None else planner.plan(rows, window)
            for window in windows
        },
        length=length,
        in_tiles=in_tiles,
        native=native,
    )


def _blocks_of(segment: Segment, block_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The block that each new token goes to."""
    if segment.count == 1:
        return np.array([segment.blocks[segment.start // block_tokens]])
    first, last = segment.start // block_tokens, (segment.end - 1) // block_tokens
    spread = np.repeat(np.array(segment.blocks[first : last + 1]), block_tokens)
    skipped = segment.start - first * block_tokens
    return spread[skipped : skipped + segment.count]
