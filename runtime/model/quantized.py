"""Weights stored in fewer bits, made whole while they are read: FP8 with a scale per block, and MXFP4.

The arithmetic is then done in the dtype that is served. What is saved is disk and download, not memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint

FP8_SCALE_SUFFIX = "_scale_inv"
# The sixteen values of E2M1, by their four bits (OCP Microscaling Formats, section 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127
_E8M0_NAN = 255


def read_weight(
    checkpoint: Checkpoint,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    fp8_block: tuple[int, int] | None = None,
) -> Tensor:
    """A tensor, with the scales of its blocks applied where it is stored in FP8.

    Args:
        fp8_block: rows and columns that share a scale, in the tensor `<name>_scale_inv`, as DeepSeek-V3 has it.

    Raises:
        CheckpointError: as `Checkpoint.read`; an FP8 tensor without scales, or scales of another shape.
    """
    if checkpoint.dtype(name).itemsize > 1:
        return checkpoint.read(name, dtype, shape)
    if fp8_block is None or checkpoint.dtype(name) is not torch.float8_e4m3fn or len(shape) != 2:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {name!r} is stored as {checkpoint.dtype(name)}; expected floating-point "
            f"numbers, or float8_e4m3fn in blocks of quantization_config.weight_block_size"
        )
    blocks = (-(-shape[0] // fp8_block[0]), -(-shape[1] // fp8_block[1]))
    scales = checkpoint.read(name + FP8_SCALE_SUFFIX, torch.float32, blocks)
    return dequantize_fp8(checkpoint.read(name, torch.float32, shape), scales, fp8_block).to(dtype)


def dequantize_fp8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Each block of `values` times its scale.

    Args:
        values: `[rows, columns]` float32.
        scales: `[ceil(rows / block[0]), ceil(columns / block[1])]` float32.

    Returns:
        `[rows, columns]` float32.
    """
    rows, columns = values.shape
    by_row = scales.repeat_interleave(block[0], 0)[:rows]
    return values * by_row.repeat_interleave(block[1], 1)[:, :columns]


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Microscaling FP4 (OCP Microscaling Formats 1.0): 32 values of four bits share a power of two.

    Args:
        blocks: `[..., count, 16]` uint8, the lower half of a byte before the upper.
        scales: `[..., count]` uint8 exponents, 127 meaning 1.

    Returns:
        `[..., count * 32]` float32.
    """
    pairs = torch.stack((blocks & 0x0F, blocks >> 4), -1).flatten(-2)
    values = torch.tensor(_E2M1)[pairs.int()]
    factors = torch.ldexp(torch.ones(scales.shape), scales.int() - _E8M0_BIAS)
    factors.masked_fill_(scales == _E8M0_NAN, torch.nan)
    return (values * factors[..., None]).flatten(-2)
