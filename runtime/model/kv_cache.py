"""The paged KV cache: keys and values of every sequence in blocks of equal length.

Which block belongs to whom is not known here: a sequence's *block table* lists its blocks in order, and grows
without anything being copied (PagedAttention, arXiv 2309.06180). A read gathers the blocks of several sequences
side by side; where those of one sequence lie in a row, it is a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NULL_BLOCK = 0  # all zeros: fills up tables of unequal length
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a model keeps of each token.

    Attributes:
        value_dim: 0 where the keys hold the values too (multi-head latent attention).
    """

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers per token and layer."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)

    def block_bytes(self, block_tokens: int, dtype: torch.dtype) -> int:
        """Memory of one block in all layers."""
        return self.num_layers * block_tokens * self.width * dtype.itemsize


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Which blocks one read covers: `sequences` times `blocks` of them, of which the first `length` tokens count.

    Attributes:
        index: `[sequences * blocks]` int64, sequence after sequence; None where they lie in a row from `first` on.
    """

    sequences: int
    blocks: int
    length: int
    index: Tensor | None
    first: int = 0


class KVCache:
    """Keys and values `[layers, blocks, block_tokens, width]`, with keys before values in each row.

    Not thread-safe: one engine owns it. Block 0 is the null block and never written, so that `num_blocks` blocks
    have the ids from 1 on.

    Args:
        layout: what the model keeps.
        num_blocks: how many there are for sequences.
        block_tokens: tokens of a block.
        dtype, device: of the stored keys and values.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.num_blocks, self.block_tokens = layout, num_blocks, block_tokens
        shape = (layout.num_layers, num_blocks + 1, block_tokens, layout.width)
        self._pool = _zeros(shape, dtype, device)
        self._rows: list[Tensor] = [layer.view(-1, layout.width) for layer in self._pool]
        self._blocks: list[Tensor] = [layer.view(num_blocks + 1, -1) for layer in self._pool]
        # Grows to the largest read: fresh memory for every gather costs twice its copying.
        self._gathered = torch.empty(0, dtype=dtype, device=device)

    @property
    def bytes_per_block(self) -> int:
        """Memory of one block in all layers."""
        return self.layout.block_bytes(self.block_tokens, self._pool.dtype)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks that get a new owner: a NaN left behind would reach it through its masked positions."""
        if blocks:
            index = torch.tensor(blocks, device=self._pool.device)
            self._pool.index_fill_(1, index, 0.0)

    def address(self, layer: int) -> int:
        """Where a layer's rows begin in memory, for native kernels; they lie side by side."""
        return self._rows[layer].data_ptr()

    def rows(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that `append` wrote to `rows [tokens]`: each `[tokens, kv_heads, dim]`."""
        layout = self.layout
        taken = self._rows[layer].index_select(0, rows)
        split = layout.num_kv_heads * layout.key_dim
        keys = taken[:, :split].view(-1, layout.num_kv_heads, layout.key_dim)
        return keys, taken[:, split:].view(-1, layout.num_kv_heads, layout.value_dim)

    def append(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor | None) -> None:
        """Writes new tokens; writing the same places again replaces them, so a forward may be repeated.

        Args:
            rows: `[tokens]` int64: block times `block_tokens` plus the place in the block.
            keys, values: `[tokens, kv_heads, key_dim or value_dim]`; values None where the keys hold them.
        """
        written = keys.flatten(1) if values is None else torch.cat((keys.flatten(1), values.flatten(1)), 1)
        self._rows[layer].index_copy_(0, rows, written)

    def read(self, layer: int, read: BlockRead) -> tuple[Tensor, Tensor]:
        """Keys `[sequences, kv_heads, length, key_dim]` and values likewise, until the next read of any layer.
        Where the keys hold the values, both are the keys."""
        layout, tokens = self.layout, read.blocks * self.block_tokens
        rows = self._take(layer, read).view(read.sequences, tokens, layout.width)[:, : read.length]
        split = layout.num_kv_heads * layout.key_dim
        heads = (read.sequences, read.length, layout.num_kv_heads)
        keys = rows[..., :split].view(*heads, layout.key_dim).transpose(1, 2)
        if not layout.value_dim:
            return keys, keys
        return keys, rows[..., split:].view(*heads, layout.value_dim).transpose(1, 2)

    def _take(self, layer: int, read: BlockRead) -> Tensor:
        blocks = self._blocks[layer]
        if read.index is None:
            return blocks[read.first : read.first + read.sequences * read.blocks]
        count = len(read.index) * blocks.shape[1]
        if count > self._gathered.numel():
            self._gathered = blocks.new_empty(count)
        out: Tensor = self._gathered[:count].view(len(read.index), blocks.shape[1])
        torch.index_select(blocks, 0, read.index, out=out)
        return out


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor born in inference mode could only be written there, and blocks are cleared outside.
    with torch.inference_mode(False):
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # torch writes its zeros; those of calloc cost memory only where something is stored.
        memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
        return torch.from_numpy(memory).view(dtype).view(shape)
