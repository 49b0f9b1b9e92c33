"""A layer up to its experts, in three calls of the native kernels: norm, queries, keys and values with their norms
and rotation; attention; output, residual and the next norm.

Tokens that decode attend natively. Prompts attend through torch, which multiplies whole matrices, unless the
forward is to be batch-invariant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import kernels
from ..native.trunk import AttentionShape, PackedAttention, supports_widths
from .attention import AttentionWeights
from .cached_attention import CachedAttention
from .kv_cache import KVCache
from .spec import DecoderSpec
from .step import Step


def has_native_attention(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for this model's layers there."""
    return (
        spec.latent is None
        and kernels.are_fast()
        and kernels.supports(dtype, device, spec.hidden_size)
        and supports_widths(spec.hidden_size, spec.head_dim)
    )


class NativeAttention:
    """See the module.

    Args:
        layer: its index, under which the cache keeps its keys and values.
        spec: the model; `has_native_attention` of it holds.
        weights: of the attention.
        input_norm, post_norm: `[hidden]` scales of the norms before and after it.
    """

    def __init__(
        self, layer: int, spec: DecoderSpec, weights: AttentionWeights, input_norm: Tensor, post_norm: Tensor
    ) -> None:
        assert weights.qkv.native is not None
        assert weights.output.native is not None
        window = spec.sliding_windows[layer]
        shape = AttentionShape(
            spec.hidden_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.norm_eps,
            spec.softmax_scale,
            spec.clip_qkv,
            window,
            spec.qk_norm,
        )
        self._layer, self._window = layer, window
        self._heads = spec.num_heads
        self._packed = PackedAttention(
            shape,
            weights.qkv.native,
            weights.output.native,
            input_norm,
            post_norm,
            weights.qk_norm,
            weights.sinks,
        )
        self._prompts = CachedAttention(
            layer,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            scale=spec.softmax_scale,
            window=window,
            sinks=weights.sinks,
        )

    def __call__(self, hidden: Tensor, step: Step, cache: KVCache, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention and its norm, both `[tokens, hidden]`, or of `rows` only.

        Args:
            hidden: `[tokens, hidden]`.
            step: the forward's plan, with `native` set.
            cache: gets the new tokens' keys and values first.
        """
        assert step.native is not None
        places, attended = step.native.places, step.native.attended
        address = cache.address(self._layer)
        queries = self._packed.project(hidden, places, address)
        if attended is None:
            out = torch.empty_like(queries)
        else:
            out = self._packed.attend(queries, attended, places, address)
        for read in step.reads[self._window].prefill:
            heads = queries[read.rows].view(-1, self._heads, self._packed.shape.head_dim)
            keys, values = cache.rows(self._layer, step.cache_rows[read.rows])
            out[read.rows] = self._prompts.attend(heads, keys, values, read, cache).flatten(1)
        return self._packed.finish(out, hidden, rows)
