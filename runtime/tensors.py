"""Between torch tensors and the bytes that travel (`TensorData`), without copying."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ConfigurationError
from .requests import TensorData

_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """ "float32" -> `torch.float32`.

    Raises:
        ConfigurationError: no dtype that pimoe computes in.
    """
    if name not in _DTYPES:
        raise ConfigurationError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}", "dtype")
    return _DTYPES[name]


def to_wire(tensor: Tensor) -> TensorData:
    """The tensor's bytes; a view of its memory when it is contiguous and on the CPU."""
    plain = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16: look at the bytes.
    data = plain.flatten().view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)
    return TensorData(_NAMES[plain.dtype], tuple(plain.shape), data.data)


def from_wire(data: TensorData, device: torch.device | str = "cpu") -> Tensor:
    """The tensor over the same memory (moved when `device` is not the CPU)."""
    dtype = torch_dtype(data.dtype)
    if not data.nbytes:
        return torch.empty(0, dtype=dtype, device=device).reshape(data.shape)  # fails where bytes are missing
    buffer = data.data if _is_writable(data.data) else bytearray(data.data)  # torch insists on writable memory
    tensor = torch.frombuffer(buffer, dtype=dtype).reshape(data.shape)
    return tensor.to(device)


def _is_writable(data: bytes | bytearray | memoryview) -> bool:
    return not isinstance(data, bytes) and not (isinstance(data, memoryview) and data.readonly)


def array_to_wire(array: NDArray[np.int32] | NDArray[np.float32]) -> TensorData:
    """A numpy array's bytes, as a view."""
    name = "int32" if array.dtype == np.int32 else "float32"  # numpy's own name costs 10 us
    return TensorData(name, array.shape, np.ascontiguousarray(array).view(np.uint8).data)


def array_from_wire(data: TensorData) -> NDArray[np.generic]:
    """The array over the same memory."""
    return np.frombuffer(data.data, dtype=data.dtype).reshape(data.shape)
