"""Checks of numbers in tensor bytes, without torch."""

from __future__ import annotations

import numpy as np

from .requests import TensorData

# The bits that are all set in NaN and infinity. numpy has no bfloat16, and is slow to test float16.
_EXPONENT_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00}


def all_finite(data: TensorData) -> bool:
    """Whether the tensor holds neither NaN nor infinity; integers never do."""
    if data.dtype.startswith("int"):
        return True
    if (exponent := _EXPONENT_BITS.get(data.dtype)) is None:
        return bool(np.isfinite(np.frombuffer(data.data, data.dtype)).all())
    # Positive bit patterns are ordered as their values, with Inf and NaN last: one pass, no per-element test.
    magnitude = np.bitwise_and(np.frombuffer(data.data, np.uint16), 0x7FFF)
    return magnitude.size == 0 or int(magnitude.max()) < exponent
