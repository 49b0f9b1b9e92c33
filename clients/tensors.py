"""numpy arrays as Open Inference Protocol tensors, without copying where their bytes allow it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidTensorError, PayloadTooLargeError, ProtocolError

# By dtype and not by name: numpy puts a dtype's name together anew each time, for microseconds.
_DATATYPES: dict[np.dtype[Any], str] = {
    np.dtype("<f4"): "FP32",
    np.dtype("<f2"): "FP16",
    np.dtype("<f8"): "FP64",
}
_DTYPES = {datatype: dtype for dtype, datatype in _DATATYPES.items()}
# A dtype of ml_dtypes, which is not imported here: who sends one has it.
_BFLOAT16 = "bfloat16"
_MAX_BYTES = 2**32 - 1


def encode(array: NDArray[Any], name: str) -> dict[str, Any]:
    """`array` as an input of that name; `data` is a view of it where it is C-contiguous and little endian.

    Raises:
        InvalidTensorError: a dtype that cannot travel.
        PayloadTooLargeError: more bytes than one message can hold.
    """
    datatype = _DATATYPES.get(array.dtype)
    if datatype is None:
        array, datatype = _little_endian(array, name)
    if array.nbytes > _MAX_BYTES:
        raise PayloadTooLargeError(f"the array has {array.nbytes} bytes; at most {_MAX_BYTES} fit", param=name)
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"name": name, "shape": array.shape, "datatype": datatype, "data": flat.data}


def _little_endian(array: NDArray[Any], name: str) -> tuple[NDArray[Any], str]:
    """For the arrays that are not most arrays: bfloat16, and those of the other byte order."""
    if array.dtype.name == _BFLOAT16:
        return array, "BF16"
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _DATATYPES:
        known = ", ".join(known.name for known in _DATATYPES)
        raise InvalidTensorError(
            f"dtype is {array.dtype.name}, and must be one of {known}, {_BFLOAT16}", param=name
        )
    return array.astype(dtype), _DATATYPES[dtype]


def decode(tensor: Mapping[str, Any], like: np.dtype[Any]) -> NDArray[Any]:
    """The array in an output, as a read-only view of the answer's bytes.

    Args:
        like: the dtype that was sent; it says what bfloat16 is, which numpy alone does not know.

    Raises:
        ProtocolError: the parts of the tensor do not fit together.
    """
    datatype, shape, data = tensor.get("datatype"), tensor.get("shape"), tensor.get("data")
    dtype = _dtype(str(datatype), like)
    if not isinstance(data, bytes) or not isinstance(shape, list):
        raise ProtocolError("an output tensor of the answer has no `shape` or no `data`")
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ProtocolError(f"an output tensor of the answer has the shape {shape!r}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(f"an output tensor {datatype} {shape} of the answer comes with {len(data)} bytes")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except (ValueError, OverflowError) as error:  # numpy bounds dimensions, in number and in length
        raise ProtocolError(f"an output tensor of the answer is none: {error}") from error


def _dtype(datatype: str, like: np.dtype[Any]) -> np.dtype[Any]:
    dtype = _DTYPES.get(datatype)
    if dtype is not None:
        return dtype
    if datatype == "BF16" and like.name == _BFLOAT16:
        return like
    raise ProtocolError(f"an output tensor of the answer has the datatype {datatype!r}; {like.name} was sent")
