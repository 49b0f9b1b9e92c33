"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the projections of keys and values absorbed.

The cache holds one small row per token: a latent vector that all heads' keys and values are projections of, and
the part of the keys that positions turn. Instead of projecting every cached row, each query is taken to the latent
space (`key_up`), attends there as if to one head that is key and value alike, and what it reads is taken to the
head's values afterwards (`value_up`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .cached_attention import CachedAttention
from .kv_cache import KVCache
from .linear import Linear
from .rope import pairs_to_halves, rotate
from .spec import DecoderSpec, LatentSpec
from .step import Step
from .trunk_weights import TrunkWeights

_NORM_EPS = 1e-6  # of the norms in here, whatever the config says of the others


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """One layer's tensors. With `queries` = `query_rank`, or heads * head_dim where there is none:

    Attributes:
        down: `[queries + kv_rank + rope_dim, hidden]`: queries, latent vector, shared part of the keys.
        query_norm: `[query_rank]`, and `query_up`: `[heads * head_dim, query_rank]`; None where there is no rank.
        kv_norm: `[kv_rank]`.
        key_up: `[heads, plain_dim, kv_rank]`, and value_up: `[heads, kv_rank, value_dim]`, their last dimension
            filled up to a multiple of 16: products of other widths treat rows differently (see `tiles`).
        output: `[hidden, heads * value_dim]`.
    """

    down: Linear
    query_norm: Tensor | None
    query_up: Linear | None
    kv_norm: Tensor
    key_up: Tensor
    value_up: Tensor
    output: Linear


class LatentAttention:
    """One layer's attention; called as `attention.Attention` is.

    Args:
        layer: its index, under which the cache keeps its rows.
        spec: the model.
        latent: `spec.latent`.
        weights: the layer's tensors.
    """

    def __init__(self, layer: int, spec: DecoderSpec, latent: LatentSpec, weights: LatentWeights) -> None:
        self.weights = weights
        self.num_heads, self.head_dim, self._latent = spec.num_heads, spec.head_dim, latent
        queries = latent.query_rank or spec.num_heads * spec.head_dim
        self._split = [queries, latent.kv_rank, latent.rope_dim]
        self._attend = CachedAttention(
            layer, spec.num_heads, 1, latent.kv_rank, scale=spec.softmax_scale, window=spec.sliding_windows[layer]
        )

    def __call__(self, hidden: Tensor, step: Step, rotary: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """See `attention.Attention`: `[tokens, hidden]` -> `[tokens, hidden]`."""
        queries, keys = step.by_rows(self._project, hidden, *rotary)
        attended = self._attend(queries, keys, None, step, cache)
        return step.by_rows(self._output, attended)

    def _output(self, attended: Tensor) -> Tensor:
        values = torch.bmm(attended.transpose(0, 1), self.weights.value_up).transpose(0, 1)
        values = values[..., : self._latent.value_dim]
        return self.weights.output(values.flatten(1))

    def _project(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        """Queries `[tokens, heads, kv_rank + rope_dim]` and what is cached, `[tokens, 1, kv_rank + rope_dim]`."""
        small, latent, shared = torch.split(self.weights.down(hidden), self._split, -1)
        heads = self._queries(small).view(hidden.shape[0], self.num_heads, self.head_dim)
        plain, turned = heads[..., : self._latent.plain_dim], heads[..., self._latent.plain_dim :]
        turned = rotate(torch.cat((turned, shared.unsqueeze(1)), 1), cosine, sine)
        absorbed = torch.bmm(plain.transpose(0, 1), self.weights.key_up).transpose(0, 1)
        absorbed = absorbed[..., : self._latent.kv_rank]
        keys = torch.cat((_norm(latent, self.weights.kv_norm), turned[:, -1]), -1)
        return torch.cat((absorbed, turned[:, :-1]), -1), keys.unsqueeze(1)

    def _queries(self, small: Tensor) -> Tensor:
        if self.weights.query_up is None or self.weights.query_norm is None:
            return small
        return self.weights.query_up(_norm(small, self.weights.query_norm))


def _norm(rows: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(rows, scale.shape, None, _NORM_EPS) * scale


def read_latent_weights(weights: TrunkWeights, spec: DecoderSpec, latent: LatentSpec, layer: int) -> LatentWeights:
    """One layer's tensors, reordered for `LatentAttention`.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    prefix, heads = f"model.layers.{layer}.self_attn", spec.num_heads
    query_norm = query_up = output_bias = None
    queries, queries_bias = _query_rows(weights, spec, latent, prefix)
    if latent.query_rank is not None:
        query_norm = weights.read(f"{prefix}.q_a_layernorm.weight", latent.query_rank)
        up = weights.read(f"{prefix}.q_b_proj.weight", heads * spec.head_dim, latent.query_rank)
        query_up = Linear(_reorder_heads(up, spec, latent))
    keys = weights.read(f"{prefix}.kv_a_proj_with_mqa.weight", latent.kv_rank + latent.rope_dim, spec.hidden_size)
    down_bias = None
    if queries_bias is not None:
        keys_bias = weights.read(f"{prefix}.kv_a_proj_with_mqa.bias", keys.shape[0])
        down_bias = torch.cat((queries_bias, _reorder(keys_bias[:, None], latent.kv_rank, latent).flatten()))
    if spec.output_bias:
        output_bias = weights.read(f"{prefix}.o_proj.bias", spec.hidden_size)
    kv_up = weights.read(
        f"{prefix}.kv_b_proj.weight", heads * (latent.plain_dim + latent.value_dim), latent.kv_rank
    ).view(heads, -1, latent.kv_rank)
    output = weights.read(f"{prefix}.o_proj.weight", spec.hidden_size, heads * latent.value_dim)
    return LatentWeights(
        down=Linear(torch.cat((queries, _reorder(keys, latent.kv_rank, latent))), down_bias),
        query_norm=query_norm,
        query_up=query_up,
        kv_norm=weights.read(f"{prefix}.kv_a_layernorm.weight", latent.kv_rank),
        key_up=_filled_up(kv_up[:, : latent.plain_dim]),
        value_up=_filled_up(kv_up[:, latent.plain_dim :].transpose(1, 2)),
        output=Linear(output, output_bias),
    )


def _filled_up(matrices: Tensor) -> Tensor:
    return F.pad(matrices, (0, -matrices.shape[-1] % 16)).contiguous()


def _query_rows(
    weights: TrunkWeights, spec: DecoderSpec, latent: LatentSpec, prefix: str
) -> tuple[Tensor, Tensor | None]:
    """The queries' rows of `down`, and their bias, which is zero where they are not made from a small vector."""
    if latent.query_rank is None:
        rows = weights.read(f"{prefix}.q_proj.weight", spec.num_heads * spec.head_dim, spec.hidden_size)
        bias = rows.new_zeros(rows.shape[0]) if spec.qkv_bias else None
        return _reorder_heads(rows, spec, latent), bias
    rows = weights.read(f"{prefix}.q_a_proj.weight", latent.query_rank, spec.hidden_size)
    return rows, weights.read(f"{prefix}.q_a_proj.bias", latent.query_rank) if spec.qkv_bias else None


def _reorder_heads(rows: Tensor, spec: DecoderSpec, latent: LatentSpec) -> Tensor:
    by_head = rows.view(spec.num_heads, spec.head_dim, -1)
    return _reorder(by_head, latent.plain_dim, latent).flatten(0, 1)


def _reorder(rows: Tensor, first: int, latent: LatentSpec) -> Tensor:
    """`[..., dims, in]` with the dimensions from `first` on as `rotate` wants them."""
    if not latent.interleaved:
        return rows
    return torch.cat((rows[..., :first, :], pairs_to_halves(rows[..., first:, :])), -2)
