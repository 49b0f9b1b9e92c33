"""Grouped-query attention: one merged projection, norms and rotation of queries and keys together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .cached_attention import CachedAttention
from .kv_cache import KVCache
from .linear import Linear
from .rope import rotate
from .spec import DecoderSpec
from .step import Step


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One layer's tensors.

    Attributes:
        qkv: `[(heads + 2 * kv_heads) * head_dim, hidden]`, queries, keys, values.
        output: `[hidden, heads * head_dim]`.
        qk_norm: scales of the norm of queries and keys: `[heads + kv_heads, head_dim]`.
        sinks: `[heads]`, see `sink_attention`.
    """

    qkv: Linear
    output: Linear
    qk_norm: Tensor | None
    sinks: Tensor | None = None


class Attention:
    """One layer's attention.

    Args:
        layer: its index, under which the cache keeps its keys and values.
        spec: the model.
        weights: the layer's tensors.
    """

    def __init__(self, layer: int, spec: DecoderSpec, weights: AttentionWeights) -> None:
        self.weights = weights
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._spec = spec
        self._attend = CachedAttention(
            layer,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            scale=spec.softmax_scale,
            window=spec.sliding_windows[layer],
            sinks=weights.sinks,
        )

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
        queries, keys, values = step.by_rows(self._project, hidden, *rotary)
        attended = self._attend(queries, keys, values, step, cache)
        return step.by_rows(self.weights.output, attended.flatten(1))

    def _project(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        """Queries `[tokens, heads, head_dim]`, keys and values `[tokens, kv_heads, head_dim]`."""
        merged = self.weights.qkv(hidden).view(hidden.shape[0], -1, self.head_dim)
        # Queries and keys are normed and rotated together: half the number of small operations.
        split = self.num_heads + self.num_kv_heads
        turned, values = self._norm(merged[:, :split]), merged[:, split:]
        if self._spec.clip_qkv is not None:
            turned = turned.clamp(-self._spec.clip_qkv, self._spec.clip_qkv)
            values = values.clamp(-self._spec.clip_qkv, self._spec.clip_qkv)
        turned = rotate(turned, cosine, sine)
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
