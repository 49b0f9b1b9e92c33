"""Rotary position embedding: the angles of each position, computed once (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .spec import RopeSpec

_FIRST_TABLE_TOKENS = 2048


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair of a head's dimensions.

    Args:
        rope: which of the ways to stretch the context, and its parameters.
        head_dim: an even number.

    Returns:
        `[head_dim / 2]` float32, on the CPU.

    Raises:
        ConfigurationError: a kind that is not implemented.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = rope.theta**exponents
    if rope.kind == "default":
        return 1.0 / periods
    if rope.kind == "linear":
        return 1.0 / periods / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / periods)
    if rope.kind == "yarn":
        return _yarn(rope, periods, head_dim)
    raise ConfigurationError(f"rotary embedding of kind {rope.kind!r} is not implemented")


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between."""
    turns = rope.original_max_tokens * frequencies / (2 * math.pi)  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(rope: RopeSpec, periods: Tensor, head_dim: int) -> Tensor:
    """YaRN (Peng et al., arXiv 2309.00071): a ramp over dimensions, placed by turns in the original context."""

    def dimension(turns: float) -> float:
        span = math.log(rope.original_max_tokens / (turns * 2 * math.pi))
        return head_dim * span / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return stretch / (rope.factor * periods) + (1 - stretch) / periods


class RotaryTable:
    """Cosine and sine of every position up to the longest seen; grows by doubling, so that a model with a long
    context costs memory only when one is used.

    Args:
        rope: the embedding.
        head_dim: dimensions of a head.
        device: where the table lies.
    """

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._attention_factor = rope.attention_factor
        self._table = self._compute(_FIRST_TABLE_TOKENS)

    def rows(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rows for `rotate`.

        Args:
            positions: `[tokens]` int64, each below `length`.
            length: the table grows to it.
            dtype: that of the queries and keys.

        Returns:
            Cosine and signed sine, each `[tokens, 1, head_dim]`.
        """
        self._grow(length)
        cosine, sine = self._table.index_select(0, positions).to(dtype).unbind(1)
        return cosine, sine

    def address(self, length: int) -> int:
        """Where `table` lies, which grows to `length`, for native kernels; the next call may lay it elsewhere."""
        self._grow(length)
        return self._table.data_ptr()

    @property
    def table(self) -> Tensor:
        """Cosine and signed sine of every position so far, `[length, 2, 1, head_dim]` float32."""
        return self._table

    def _grow(self, length: int) -> None:
        if length > self._table.shape[0]:
            self._table = self._compute(max(length, 2 * self._table.shape[0]))

    def _compute(self, length: int) -> Tensor:
        positions = torch.arange(length, dtype=torch.float32, device=self._frequencies.device)
        angles = torch.outer(positions, self._frequencies)
        cosine, sine = angles.cos() * self._attention_factor, angles.sin() * self._attention_factor
        # The sine carries the sign of "rotate half", so that `rotate` needs no negation.
        both = torch.stack((torch.cat((cosine, cosine), 1), torch.cat((-sine, sine), 1)), 1)
        return both.unsqueeze(2)


def pairs_to_halves(rows: Tensor) -> Tensor:
    """Weights whose outputs are turned in pairs side by side, reordered for `rotate`: `[..., dims, in]`, the even
    dimensions before the odd ones. Scores do not change while queries and keys are reordered alike."""
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), -2)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns the first half of every head's dimensions against the second (the layout of Hugging Face).

    Args:
        heads: `[tokens, heads, head_dim]`.
        cosine, sine: from `RotaryTable.rows`.

    Returns:
        `[tokens, heads, head_dim]`.
    """
    halves_swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cosine, halves_swapped, sine)
