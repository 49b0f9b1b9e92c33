"""The trunk's kernels: norms, attention over the paged cache with what lies around it, the gate.

Every row is computed on its own: its bits depend neither on the rows beside it, nor on which of a sequence's
tokens come in one forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .kernels import Int32, PackedLinear, kind_of, module, threads

_VECTOR = 16  # numbers that a kernel takes at once
_QK_NORMS = {"none": 0, "head": 1, "full": 2}


def supports_widths(hidden: int, head_dim: int) -> bool:
    """Whether rows and the halves of heads are whole vectors."""
    return hidden % _VECTOR == 0 and head_dim % (2 * _VECTOR) == 0


def rms_norm(hidden: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`hidden / rms(hidden) * scale`, rounded before the scale: `[rows, width]`, contiguous, -> the same shape."""
    out = torch.empty_like(hidden)
    rows, width = hidden.shape
    kind = kind_of(hidden.dtype, False)
    module().run_norm(kind, hidden.data_ptr(), scale.data_ptr(), rows, width, eps, out.data_ptr())
    return out


def add(hidden: Tensor, sums: Tensor) -> Tensor:
    """`hidden [rows, width]` plus float32 `sums`, which are rounded to its dtype first; both contiguous."""
    out = torch.empty_like(hidden)
    kind = kind_of(hidden.dtype, False)
    module().run_add(kind, hidden.data_ptr(), sums.data_ptr(), hidden.numel(), out.data_ptr())
    return out


class PackedGate:
    """Softmax over all experts, then the `top_k` largest, of equal ones the first; options as in `TopKSoftmax`."""

    def __init__(self, weight: Tensor, top_k: int, renormalize: bool, round_weights: bool) -> None:
        self._matrix = PackedLinear(weight).matrix
        self._options = top_k, renormalize, round_weights

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`[tokens, hidden]` -> expert ids `[tokens, top_k]` int64 and their weights float32."""
        hidden, matrix = hidden.contiguous(), self._matrix
        count, top_k = hidden.shape[0], self._options[0]
        ids = torch.empty((count, top_k), dtype=torch.int64)
        weights = torch.empty((count, top_k), dtype=torch.float32)
        module().run_route(
            matrix.kind,
            matrix.handle,
            matrix.columns,
            hidden.data_ptr(),
            count,
            *self._options,
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return ids, weights


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one layer's attention is.

    Attributes:
        scale: of the scores.
        clip: of queries, keys and values from both sides, or None.
        window: tokens that a token sees, itself included; None: all.
        qk_norm: "none", "head" (each head by itself) or "full" (all queries, all keys).
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    clip: float | None
    window: int | None
    qk_norm: str


@dataclass(frozen=True, slots=True)
class AttendedTokens:
    """Tokens of a forward that attend one by one: rows of the batch, and each one's blocks of the cache.

    Attributes:
        rows: `[count]`.
        tables: `[count]` where each one's blocks begin in `blocks`.
        blocks: block tables of sequences, one after the other.
    """

    rows: Int32
    tables: Int32
    blocks: Int32

    @classmethod
    def of(cls, segments: Sequence[tuple[Sequence[int], int, int]]) -> AttendedTokens:
        """Of segments given by their blocks, first row and number of rows."""
        starts = [0, *accumulate(len(blocks) for blocks, _, _ in segments)]
        counts = [count for _, _, count in segments]
        rows = np.concatenate([np.arange(row, row + count, dtype=np.int32) for _, row, count in segments])
        tables = np.repeat(np.array(starts[:-1], np.int32), counts)
        blocks = np.fromiter((block for blocks, _, _ in segments for block in blocks), np.int32, starts[-1])
        return cls(rows, tables, blocks)


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """New tokens of a forward, and where the cache keeps them; addresses of what lives as long as the forward.

    Attributes:
        count: tokens.
        positions, cache_rows: addresses of `[count]` int64.
        rotary: address of the float32 table `[positions, 2, head_dim]`.
        block_tokens: tokens of a block of the cache.
    """

    count: int
    positions: int
    cache_rows: int
    rotary: int
    block_tokens: int


class PackedAttention:
    """One layer's norms, projections, rotation and attention.

    Args:
        shape: see `AttentionShape`.
        qkv, output: `[(heads + 2 * kv_heads) * head_dim, hidden]` and `[hidden, heads * head_dim]`.
        input_norm, post_norm: `[hidden]` scales of the norms before and after.
        qk_scale: `[heads + kv_heads, head_dim]`, or None.
        sinks: `[heads]` logits of places in the softmax where nothing is read, or None.
    """

    def __init__(
        self,
        shape: AttentionShape,
        qkv: PackedLinear,
        output: PackedLinear,
        input_norm: Tensor,
        post_norm: Tensor,
        qk_scale: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.shape, self._width = shape, shape.heads * shape.head_dim
        scale = None if qk_scale is None else qk_scale.contiguous()
        self._kept = (qkv, output, input_norm, scale, post_norm, None if sinks is None else sinks.float())
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self._kept[2:]]
        self._handle = module().attention(
            kind_of(input_norm.dtype, False),
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.eps,
            shape.scale,
            math.inf if shape.clip is None else shape.clip,
            shape.window or 0,
            _QK_NORMS[shape.qk_norm],
            *addresses,
            qkv.matrix.handle,
            output.matrix.handle,
        )

    def project(self, hidden: Tensor, places: TokenPlaces, cache: int) -> Tensor:
        """Contiguous `[tokens, hidden]` -> queries `[tokens, heads * head_dim]`; keys and values go to the cache.

        Args:
            cache: address of the layer's rows.
        """
        queries = hidden.new_empty((places.count, self._width))
        module().run_project(self._handle, *_flat(places, cache), hidden.data_ptr(), queries.data_ptr(), threads())
        return queries

    def attend(self, queries: Tensor, attended: AttendedTokens, places: TokenPlaces, cache: int) -> Tensor:
        """`[tokens, heads * head_dim]` of the same shape, of which the rows of `attended` are computed."""
        out = torch.empty_like(queries)
        addresses = [array.ctypes.data for array in (attended.rows, attended.tables, attended.blocks)]
        module().run_attend(
            self._handle,
            *_flat(places, cache),
            len(attended.rows),
            *addresses,
            queries.data_ptr(),
            out.data_ptr(),
            threads(),
        )
        return out

    def finish(self, attended: Tensor, hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, `[rows, hidden]`, and its norm.

        Args:
            attended: `[tokens, heads * head_dim]`.
            hidden: `[tokens, hidden]`.
            rows: `[rows]` int64 of both; None for all.
        """
        count = hidden.shape[0] if rows is None else rows.shape[0]
        out = hidden.new_empty((count, self.shape.hidden))
        normed = torch.empty_like(out)
        chosen = 0 if rows is None else rows.data_ptr()
        module().run_finish(
            self._handle,
            attended.data_ptr(),
            hidden.data_ptr(),
            chosen,
            count,
            out.data_ptr(),
            normed.data_ptr(),
            threads(),
        )
        return out, normed


def _flat(places: TokenPlaces, cache: int) -> tuple[int, ...]:
    return places.count, places.positions, places.cache_rows, places.rotary, cache, places.block_tokens
