"""Attention over the KV cache: one merged projection, grouped queries without repeating keys, one call for all
decoding sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .kv_cache import KVCache
from .linear import Linear
from .rope import rotate
from .spec import DecoderSpec
from .step import DecodeRead, PrefillRead, Reads, Step


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One layer's tensors.

    Attributes:
        qkv: `[(heads + 2 * kv_heads) * head_dim, hidden]`, queries, keys, values.
        output: `[hidden, heads * head_dim]`.
        qk_norm: scales of the norm of queries and keys: `[heads + kv_heads, head_dim]`.
    """

    qkv: Linear
    output: Linear
    qk_norm: Tensor | None


class Attention:
    """One layer's attention.

    Args:
        layer: its index, under which the cache keeps its keys and values.
        spec: the model.
        weights: the layer's tensors.
    """

    def __init__(self, layer: int, spec: DecoderSpec, weights: AttentionWeights) -> None:
        self.layer = layer
        self.weights = weights
        self.window = spec.sliding_windows[layer]
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._spec = spec
        # With one query per KV head the CPU's bfloat16 kernel takes a path five times slower than with two.
        cpu_bfloat16 = weights.qkv.device.type == "cpu" and weights.qkv.dtype is torch.bfloat16
        self._doubles_queries = cpu_bfloat16 and spec.num_heads == spec.num_kv_heads

    def __call__(self, hidden: Tensor, step: Step, rotary: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """Attention of new tokens to themselves and to what the cache holds of their sequences.

        Args:
            hidden: `[tokens, hidden]`, normed.
            step: the forward's plan.
            rotary: cosine and sine from `RotaryTable.rows`.
            cache: gets the new tokens' keys and values first.

        Returns:
            `[tokens, hidden]`.
        """
        queries, keys, values = self._project(hidden, rotary)
        cache.append(self.layer, step.slots, step.positions, keys, values)
        attended = self._attend(queries, step.reads[self.window], cache)
        return self.weights.output(attended)

    def _project(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[tokens, heads, head_dim]`, keys and values `[tokens, kv_heads, head_dim]`."""
        merged = self.weights.qkv(hidden).view(hidden.shape[0], -1, self.head_dim)
        # Queries and keys are normed and rotated together: half the number of small operations.
        split = self.num_heads + self.num_kv_heads
        turned, values = self._norm(merged[:, :split]), merged[:, split:]
        if self._spec.clip_qkv is not None:
            turned = turned.clamp(-self._spec.clip_qkv, self._spec.clip_qkv)
            values = values.clamp(-self._spec.clip_qkv, self._spec.clip_qkv)
        turned = rotate(turned, *rotary)
        return turned[:, : self.num_heads], turned[:, self.num_heads :], values

    def _norm(self, heads: Tensor) -> Tensor:
        scale = self.weights.qk_norm
        if scale is None:
            return heads
        eps = self._spec.norm_eps
        if self._spec.qk_norm == "head":
            return F.rms_norm(heads, (self.head_dim,), None, eps) * scale
        parts = heads[:, : self.num_heads], heads[:, self.num_heads :]
        return torch.cat([F.rms_norm(part, part.shape[1:], None, eps) for part in parts], 1) * scale

    def _attend(self, queries: Tensor, reads: Reads, cache: KVCache) -> Tensor:
        """`[tokens, heads * head_dim]`."""
        tokens = queries.shape[0]
        if reads.decode is not None and not reads.prefill and isinstance(reads.decode.rows, slice):
            return self._decode(queries, reads.decode, cache)
        if reads.decode is None and len(reads.prefill) == 1:
            return self._prefill(queries, reads.prefill[0], cache)
        attended = queries.new_empty((tokens, self.num_heads * self.head_dim))
        if reads.decode is not None:
            attended[reads.decode.rows] = self._decode(queries[reads.decode.rows], reads.decode, cache)
        for read in reads.prefill:
            attended[read.rows] = self._prefill(queries[read.rows], read, cache)
        return attended

    def _decode(self, queries: Tensor, read: DecodeRead, cache: KVCache) -> Tensor:
        """One query token per slot. The queries that share a KV head stand in as that head's query tokens, so
        that keys and values are read once and never repeated."""
        count, group = queries.shape[0], self.num_heads // self.num_kv_heads
        grouped = queries.reshape(count, self.num_kv_heads, group, self.head_dim)
        if self._doubles_queries:
            grouped = grouped.expand(-1, -1, 2, -1)
        if read.places is not None:
            spread = grouped.new_zeros((read.slots.count, *grouped.shape[1:]))
            grouped = spread.index_copy_(0, read.places, grouped)
        keys, values = cache.read(self.layer, read.slots, read.first, read.length)
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=read.mask)
        if read.places is not None:
            attended = attended.index_select(0, read.places)
        return attended[:, :, :group].reshape(count, -1)

    def _prefill(self, queries: Tensor, read: PrefillRead, cache: KVCache) -> Tensor:
        """Many query tokens of one slot. KV heads stand in as the batch, so that the group of queries sharing
        one sees it through a stride of zero."""
        count = queries.shape[0]
        grouped = queries.view(count, self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3)
        keys, values = cache.read(self.layer, read.slots, read.first, read.length)
        shape = (self.num_kv_heads, grouped.shape[1], keys.shape[2], self.head_dim)
        attended = F.scaled_dot_product_attention(
            grouped,
            keys[0].unsqueeze(1).expand(shape),
            values[0].unsqueeze(1).expand(shape),
            attn_mask=read.mask,
            is_causal=read.causal,
        )
        return attended.permute(2, 0, 1, 3).reshape(count, -1)
