"""Attention of new tokens to themselves and to what the paged cache holds of their sequences.

What is attended is the families' business (`attention`, `latent_attention`); how the cache is read is here, once:
grouped queries without repeating keys, one call for decoding sequences of about one length, one for each in
prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .kv_cache import KVCache
from .reads import DecodeRead, PrefillRead, TileRead
from .sink_attention import attend_with_sinks
from .step import Step
from .tiles import TILE_ROWS


class CachedAttention:
    """One layer's reading and writing of the cache.

    Args:
        layer: its index, under which the cache keeps its keys and values.
        num_heads, num_kv_heads: queries and keys; queries that share a KV head lie side by side.
        value_dim: of each head's output; where values are not given, they are so many first numbers of the keys.
        scale: of the scores; None for `key_dim ** -0.5`.
        window: how many tokens a token sees, itself included; None: all before it.
        sinks: `[heads]` logits of places in the softmax where nothing is read (see `sink_attention`), or None.
    """

    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        value_dim: int,
        scale: float | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.value_dim = num_heads, num_kv_heads, value_dim
        self.scale, self.window = scale, window
        self._sinks = None if sinks is None else sinks.view(num_kv_heads, -1)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor | None, step: Step, cache: KVCache) -> Tensor:
        """Stores the new tokens and attends.

        Args:
            queries: `[tokens, heads, key_dim]`.
            keys: `[tokens, kv_heads, key_dim]`.
            values: `[tokens, kv_heads, value_dim]`; None where the keys hold them.

        Returns:
            `[tokens, heads, value_dim]`.
        """
        cache.append(self.layer, step.cache_rows, keys, values)
        reads = step.reads[self.window]
        fresh = keys, keys if values is None else values
        if (only := reads.only) is not None:
            return self.attend(queries, *fresh, only, cache)
        attended = queries.new_empty((queries.shape[0], self.num_heads, self.value_dim))
        for read in reads.all:
            rows = read.rows
            attended[rows] = self.attend(queries[rows], fresh[0][rows], fresh[1][rows], read, cache)
        return attended

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        read: DecodeRead | PrefillRead | TileRead,
        cache: KVCache,
    ) -> Tensor:
        """One read's part of `__call__`, once the new tokens are stored; all arguments are those of its rows."""
        if isinstance(read, DecodeRead):
            out = self._decode(queries, read, cache)
        elif isinstance(read, TileRead):
            out = self._tiles(queries, read, cache)
        else:
            out = self._prefill(queries, keys, values, read, cache)
        return out[..., : self.value_dim]

    def _decode(self, queries: Tensor, read: DecodeRead, cache: KVCache) -> Tensor:
        """One query token per sequence. The queries that share a KV head stand in as that head's query tokens, so
        that keys and values are read once and never repeated."""
        count, group = queries.shape[0], self.num_heads // self.num_kv_heads
        grouped = queries.reshape(count, self.num_kv_heads, group, -1)
        if group == 1 and queries.dtype is torch.bfloat16 and queries.device.type == "cpu":
            # With one query per KV head the CPU's bfloat16 kernel takes a path five times slower than with two.
            grouped = grouped.expand(-1, -1, 2, -1)
        keys, values = cache.read(self.layer, read.read)
        attended = self._dot_product(grouped, keys, values, self._sinks, read.mask, False)
        return attended[:, :, :group].reshape(count, self.num_heads, -1)

    def _prefill(self, queries: Tensor, keys: Tensor, values: Tensor, read: PrefillRead, cache: KVCache) -> Tensor:
        """Many query tokens of one sequence. KV heads stand in as the batch, so that the group of queries sharing
        one sees it through a stride of zero."""
        count, heads = queries.shape[0], self.num_kv_heads
        grouped = queries.reshape(count, heads, -1, queries.shape[-1]).permute(1, 2, 0, 3)
        if read.read is None:
            keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        else:
            keys, values = (tensor[0] for tensor in cache.read(self.layer, read.read))
        group = grouped.shape[1]
        attended = self._dot_product(
            grouped,
            keys.unsqueeze(1).expand(-1, group, -1, -1),
            values.unsqueeze(1).expand(-1, group, -1, -1),
            None if self._sinks is None else self._sinks.unsqueeze(-1),
            read.mask,
            read.read is None,
        )
        return attended.permute(2, 0, 1, 3).reshape(count, self.num_heads, -1)

    def _tiles(self, queries: Tensor, read: TileRead, cache: KVCache) -> Tensor:
        """Tiles of positions of any sequences, with zeros for queries that are not there."""
        tiles, heads = read.read.sequences, self.num_kv_heads
        spread = queries.new_zeros((tiles * TILE_ROWS, *queries.shape[1:]))
        spread[read.places] = queries
        grouped = spread.view(tiles, TILE_ROWS, heads, -1, queries.shape[-1]).permute(0, 2, 3, 1, 4)
        group = grouped.shape[2]
        keys, values = cache.read(self.layer, read.read)
        attended = self._dot_product(
            grouped.reshape(tiles, heads, group * TILE_ROWS, -1),
            keys,
            values,
            None if self._sinks is None else self._sinks.repeat_interleave(TILE_ROWS, 1),
            read.mask.repeat(1, 1, group, 1),
            False,
        )
        attended = attended.view(tiles, heads, group, TILE_ROWS, -1).permute(0, 3, 1, 2, 4)
        return attended.reshape(tiles * TILE_ROWS, self.num_heads, -1)[read.places]

    def _dot_product(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor | None,
        mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        if sinks is not None:
            return attend_with_sinks(queries, keys, values, sinks, mask, causal, self.scale)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=self.scale
        )
