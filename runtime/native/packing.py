"""The layout that the kernels read weights in: panels of 64 output columns, in each of them input after input.

A panel is read from one end to the other, once for up to six rows. With bfloat16 activations two inputs lie side
by side for each column, as the processor's instruction takes them. int8 has a scale for every output column
(symmetric, 127 steps to the largest weight).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 64
HALF = PANEL // 2


def padded(count: int, whole: int) -> int:
    """`count` made up to a multiple of `whole`."""
    return -(-count // whole) * whole


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[columns, k]` -> int8 numbers from -127 to 127 of that shape, and float32 scales `[columns]`."""
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def pack(weight: Tensor, paired: bool, magnitudes: bool = False) -> Tensor:
    """A matrix in the order in which the kernels read it.

    Args:
        weight: `[columns, k]`; columns are made up to whole panels with zeros.
        paired: two inputs side by side; `k` must be even.
        magnitudes: int8 as a sign and seven bits, in the order that widening to bfloat16 leaves (`paired` only).

    Returns:
        Flat, of the same dtype.
    """
    columns, k = weight.shape
    weight = F.pad(weight, (0, 0, 0, padded(columns, PANEL) - columns))
    if not paired:
        return weight.view(-1, PANEL, k).permute(0, 2, 1).flatten()
    pairs = weight.view(-1, PANEL, k // 2, 2).permute(0, 2, 1, 3)
    if not magnitudes:
        return pairs.flatten()
    signs_and_bits = torch.where(pairs < 0, -pairs - 128, pairs)
    # Unpacking takes the lower and the upper eight bytes of each 16 for two registers: 2 halves of 32 columns, of
    # which the first 16 (8 bytes in each of 4 lanes) come from the lower ones.
    lanes = signs_and_bits.reshape(-1, 2, 2, 4, 8).permute(0, 1, 3, 2, 4)
    return lanes.flatten()


def interleaved(gate_up: Tensor) -> Tensor:
    """Gate and up `[2 * inner, ...]` so that each panel holds 32 columns of one and the same 32 of the other:
    `[2 * padded inner, ...]`."""
    inner = gate_up.shape[0] // 2
    missing = padded(inner, HALF) - inner
    rest = gate_up.shape[1:]
    halves = [torch.cat((half, half.new_zeros((missing, *rest)))) for half in (gate_up[:inner], gate_up[inner:])]
    return torch.stack([half.view(-1, HALF, *rest) for half in halves], 1).reshape(-1, *rest)
