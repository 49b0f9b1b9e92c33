"""One forward's batch, and everything about it that all layers share, computed once.

A batch is ragged: sequences that decode bring one token, those in prefill bring many. Linear layers see the
flat list of tokens; attention reads the cache once for all decoding sequences together and once for each other
one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_cache import SlotView


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` new tokens of the sequence in cache slot `slot`, of which `start` tokens are cached already."""

    slot: int
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
        segments: at least one, each of a slot of its own.
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
        if len({segment.slot for segment in self.segments}) != len(counts):
            raise ValueError("two segments of one forward share a slot")


@dataclass(frozen=True, slots=True)
class DecodeRead:
    """Attention of all one-token segments at once.

    Attributes:
        rows: their rows in the batch, in order of slots; a slice where they lie side by side.
        places: `[rows]` where each row's query stands among the slots read; None when they fill them in order.
        slots, first, length: what is read of the cache.
        mask: additive `[slots, 1, 1, length - first]`, or None where every slot sees all of it.
    """

    rows: Tensor | slice
    places: Tensor | None
    slots: SlotView
    first: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRead:
    """Attention of one longer segment.

    Attributes:
        rows: its rows in the batch.
        slots, first, length: what is read of the cache.
        mask: additive `[count, length - first]`; None where `causal` says it all.
        causal: queries and keys are the same tokens, each seeing itself and those before.
    """

    rows: slice
    slots: SlotView
    first: int
    length: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class Reads:
    """How the layers of one sliding window read the cache in this forward."""

    decode: DecodeRead | None
    prefill: tuple[PrefillRead, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers share in one forward.

    Attributes:
        slots, positions: `[tokens]` int64, where each token's key and value go.
        output_rows: `[outputs]` int64.
        reads: by the layers' sliding window.
        length: the longest sequence after the forward.
    """

    slots: Tensor
    positions: Tensor
    output_rows: Tensor
    reads: dict[int | None, Reads]
    length: int


def plan_step(
    batch: ForwardBatch, windows: Collection[int | None], dtype: torch.dtype, device: torch.device
) -> Step:
    """Everything about `batch` that all layers share.

    Args:
        batch: the new tokens.
        windows: the sliding windows that occur in the model.
        dtype: of queries and keys, and so of the masks.
        device: where the tensors go.
    """
    counts = torch.tensor([segment.count for segment in batch.segments])
    rows_before = counts.cumsum(0) - counts
    starts = torch.tensor([segment.start for segment in batch.segments])
    slots = torch.tensor([segment.slot for segment in batch.segments])
    total = batch.token_ids.shape[0]
    positions = torch.arange(total) + (starts - rows_before).repeat_interleave(counts, output_size=total)
    outputs = rows_before + counts - 1 if batch.output_rows is None else batch.output_rows
    first_rows = rows_before.tolist()
    return Step(
        slots=slots.repeat_interleave(counts, output_size=total).to(device),
        positions=positions.to(device),
        output_rows=outputs.to(device),
        reads={window: _plan_reads(batch.segments, first_rows, window, dtype, device) for window in windows},
        length=max(segment.end for segment in batch.segments),
    )


def _plan_reads(
    segments: Sequence[Segment], rows: Sequence[int], window: int | None, dtype: torch.dtype, device: torch.device
) -> Reads:
    single = [(segment, row) for segment, row in zip(segments, rows, strict=True) if segment.count == 1]
    longer = [(segment, row) for segment, row in zip(segments, rows, strict=True) if segment.count > 1]
    return Reads(
        _plan_decode(single, window, dtype, device) if single else None,
        tuple(_plan_prefill(segment, row, window, dtype, device) for segment, row in longer),
    )


def _plan_decode(
    tokens: list[tuple[Segment, int]], window: int | None, dtype: torch.dtype, device: torch.device
) -> DecodeRead:
    tokens.sort(key=lambda item: item[0].slot)
    slots, rows = [segment.slot for segment, _ in tokens], [row for _, row in tokens]
    view, places = select_slots(slots, device)
    length = max(segment.end for segment, _ in tokens)
    shortest = min(segment.end for segment, _ in tokens)
    first = 0 if window is None else max(0, shortest - window)
    mask = None
    if shortest != length or places is not None:
        # Slots of the view without a query in this step see one position, so that their softmax stays finite.
        ends = [first + 1] * view.count
        for place, (segment, _) in enumerate(tokens):
            ends[place if places is None else segment.slot - view.first] = segment.end
        mask = _mask(torch.tensor(ends, device=device)[:, None], first, length, window, dtype)[:, None, None]
    return DecodeRead(_as_slice(rows, device), places, view, first, length, mask)


def _plan_prefill(
    segment: Segment, row: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> PrefillRead:
    first = 0 if window is None else max(0, segment.start + 1 - window)
    causal = segment.start == 0 and (window is None or segment.count <= window)
    mask = None
    if not causal:
        ends = torch.arange(segment.start + 1, segment.end + 1, device=device)[:, None]
        mask = _mask(ends, first, segment.end, window, dtype)
    view = SlotView(segment.slot, segment.slot + 1)
    return PrefillRead(slice(row, row + segment.count), view, first, segment.end, mask, causal)


def _mask(ends: Tensor, first: int, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask `[rows, length - first]`: a row whose sequence ends at `ends` sees what lies before that,
    and of it no more than `window` tokens."""
    positions = torch.arange(first, length, device=ends.device)
    hidden = positions >= ends
    if window is not None:
        hidden |= positions < ends - window
    return torch.zeros(hidden.shape, dtype=dtype, device=ends.device).masked_fill_(hidden, -torch.inf)


def select_slots(slots: Sequence[int], device: torch.device) -> tuple[SlotView, Tensor | None]:
    """How to read the given slots (ascending, distinct) without copying, if that is cheap.

    A range costs no copy, and its unused slots cost arithmetic for nothing; so a range is taken while at
    least half of it is used, and a copy of just the slots asked for otherwise.

    Returns:
        The view, and where in it each slot lies; None when they fill it in order.
    """
    span = slots[-1] + 1 - slots[0]
    if span == len(slots):
        return SlotView(slots[0], slots[-1] + 1), None
    if span <= 2 * len(slots):
        places = torch.tensor([slot - slots[0] for slot in slots], device=device)
        return SlotView(slots[0], slots[-1] + 1), places
    return SlotView(slots[0], slots[-1] + 1, torch.tensor(slots, device=device)), None


def _as_slice(rows: list[int], device: torch.device) -> Tensor | slice:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)
