"""The KV cache: keys and values of every running sequence, in slots of equal length.

Slots are handed out lowest first, so that the running sequences lie side by side and a decode step can read
them as one view. The tensors grow by doubling, in slots and in length, up to the limits.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ContextLengthError, OverloadedError

_FIRST_SLOTS = 4
_FIRST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SlotView:
    """Which slots one read covers: the range from `first` to below `stop`, or those of `index` where given."""

    first: int
    stop: int
    index: Tensor | None = None

    @property
    def count(self) -> int:
        """Sequences in the view."""
        return self.stop - self.first if self.index is None else self.index.shape[0]


class KVCache:
    """Keys and values `[slots, kv_heads, tokens, head_dim]` of each layer.

    Not thread-safe: one engine owns it.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        max_sequences: slots at most.
        max_tokens: length of a sequence at most.
        dtype, device: of the stored keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self._free = list(range(max_sequences))
        self._used: dict[int, int] = {}  # slot -> tokens ever written since it was allocated
        shape = (min(_FIRST_SLOTS, max_sequences), num_kv_heads, min(_FIRST_TOKENS, max_tokens), head_dim)
        self._keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self._values = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    @property
    def bytes(self) -> int:
        """Memory held by keys and values of all layers."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token's keys and values in all layers."""
        slots, _, tokens, _ = self._keys[0].shape
        return self.bytes // (slots * tokens)

    @property
    def free_slots(self) -> int:
        """How many sequences can still be allocated."""
        return len(self._free)

    def allocate(self) -> int:
        """A slot for a new sequence. Raises OverloadedError when all are taken."""
        if not self._free:
            raise OverloadedError(f"all {self.max_sequences} sequence slots of the KV cache are taken")
        slot = heapq.heappop(self._free)
        self._used[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Gives a slot back. Raises KeyError when it is not allocated."""
        used = self._used.pop(slot)
        heapq.heappush(self._free, slot)
        # A NaN left behind would reach the slot's next sequence through its masked positions.
        for tensor in (*self._keys, *self._values):
            if used:
                tensor[slot, :, :used].zero_()

    def prepare(self, ends: Sequence[tuple[int, int]]) -> None:
        """Makes room before a forward.

        Args:
            ends: for each sequence of the forward, its slot and its length after it.

        Raises:
            ContextLengthError: a sequence would become longer than `max_tokens`.
            KeyError: a slot is not allocated.
        """
        for slot, end in ends:
            if end > self.max_tokens:
                raise ContextLengthError(f"a sequence of {end} tokens; the KV cache holds {self.max_tokens}")
            self._used[slot] = max(self._used[slot], end)
        slots = _grown(self._keys[0].shape[0], 1 + max(slot for slot, _ in ends), self.max_sequences)
        tokens = _grown(self._keys[0].shape[2], max(end for _, end in ends), self.max_tokens)
        if (slots, tokens) != (self._keys[0].shape[0], self._keys[0].shape[2]):
            # One layer after another, so that old and new memory coexist for one layer only.
            for tensors in (self._keys, self._values):
                for layer, old in enumerate(tensors):
                    tensors[layer] = _enlarged(old, slots, tokens)

    def append(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes new tokens; writing the same positions again replaces them, so a forward may be repeated.

        Args:
            slots, positions: `[tokens]` int64.
            keys, values: `[tokens, kv_heads, head_dim]`.
        """
        self._keys[layer][slots, :, positions] = keys
        self._values[layer][slots, :, positions] = values

    def read(self, layer: int, slots: SlotView, first: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions from `first` to below `length`, each
        `[slots, kv_heads, length - first, head_dim]`: a view, or a copy where `slots` is no range."""
        keys, values = self._keys[layer], self._values[layer]
        if slots.index is not None:
            keys = keys[:, :, first:length].index_select(0, slots.index)
            return keys, values[:, :, first:length].index_select(0, slots.index)
        rows = slice(slots.first, slots.stop)
        return keys[rows, :, first:length], values[rows, :, first:length]


def _grown(size: int, needed: int, limit: int) -> int:
    return size if needed <= size else min(limit, max(needed, 2 * size))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Zeros, not empty: a masked position still takes part in the arithmetic, and 0 * NaN is NaN. A tensor born in
    # inference mode could only be written there, and slots are freed outside.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


def _enlarged(old: Tensor, slots: int, tokens: int) -> Tensor:
    new = _zeros((slots, old.shape[1], tokens, old.shape[3]), old.dtype, old.device)
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
