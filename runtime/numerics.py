"""Checks of numbers in tensor bytes, without torch."""

from __future__ import annotations

import numpy as np

from .requests import TensorData

_BFLOAT16_EXPONENT = 0x7F80  # all ones: NaN or infinity


def all_finite(data: TensorData) -> bool:
    """Whether the tensor holds neither NaN nor infinity; integers never do."""
    if data.dtype == "bfloat16":
        bits = np.frombuffer(data.data, np.uint16)
        return not bool(((bits & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any())
    if data.dtype.startswith("int"):
        return True
    return bool(np.isfinite(np.frombuffer(data.data, data.dtype)).all())
