"""Tensors on the wire: the one place that maps the Open Inference Protocol's datatypes to pimoe's dtypes, and
that decides whether bytes or numbers are a proper tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ...runtime.errors import InvalidTensorError
from ...runtime.numerics import all_finite
from ...runtime.requests import DTYPE_BYTES, ModelInfo, TensorData
from .fields import shown

INPUT_NAME = "hidden_states"
OUTPUT_NAME = "output"

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype: pimoe's name, and how numpy reads its bytes (it has no bfloat16)."""

    name: str
    numpy: str


DATATYPES: dict[str, Datatype] = {
    "FP32": Datatype("float32", "<f4"),
    "FP16": Datatype("float16", "<f2"),
    "BF16": Datatype("bfloat16", "<u2"),
    "FP64": Datatype("float64", "<f8"),
}
DATATYPE_OF: dict[str, str] = {kind.name: datatype for datatype, kind in DATATYPES.items()}


def wrong(message: str) -> NoReturn:
    """Refuses the input tensor.

    Raises:
        InvalidTensorError: always.
    """
    raise InvalidTensorError(f"{INPUT_NAME}: {message}", INPUT_NAME)


def checked_datatype(datatype: object) -> Datatype:
    """The datatype of that name.

    Raises:
        InvalidTensorError: none of ours.
    """
    kind = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if kind is None:
        wrong(f"datatype is {shown(datatype)}; it must be one of {', '.join(DATATYPES)}")
    return kind


def checked_shape(shape: object, model: ModelInfo) -> tuple[int, int]:
    """The shape `[tokens, hidden]`.

    Raises:
        InvalidTensorError: not two positive integers, or another hidden size than the model's.
    """
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(type(size) is int for size in shape):
        wrong(f"shape is {_shape_text(shape)}; it must be [tokens, {model.hidden_size}]")
    tokens, hidden = shape
    if tokens < 1:
        wrong(f"shape {_shape_text(shape)} has no tokens; there must be at least one")
    if hidden != model.hidden_size:
        wrong(f"hidden size is {shown(hidden)}; {shown(model.name)} has {model.hidden_size}")
    return tokens, hidden


def from_bytes(kind: Datatype, shape: tuple[int, int], data: bytes | memoryview) -> TensorData:
    """A tensor over `data`, which is not copied.

    Raises:
        InvalidTensorError: its length is not the shape's, or it holds NaN or Inf.
    """
    expected = shape[0] * shape[1] * DTYPE_BYTES[kind.name]
    if len(data) != expected:
        takes = f"shape {_shape_text(shape)} of {kind.name} takes {_count_text(expected)}"
        wrong(f"{len(data)} bytes of data; {takes}")
    tensor = TensorData(kind.name, shape, data)
    if not all_finite(tensor):
        wrong("holds NaN or Inf")
    return tensor


def from_numbers(kind: Datatype, shape: tuple[int, int], data: object) -> TensorData:
    """A tensor from JSON numbers, flat or as one list per token, rounded to the datatype.

    Raises:
        InvalidTensorError: not numbers, not as many as the shape says, or one is beyond the datatype's range.
    """
    if not isinstance(data, list):
        wrong(f"data is {shown(data)}; it must be a list of numbers")
    if data and isinstance(data[0], list):
        if not all(isinstance(row, list) and len(row) == shape[1] for row in data):
            wrong(f"data has rows of other lengths than {shape[1]}")
        data = list(chain.from_iterable(data))
    if len(data) != shape[0] * shape[1]:
        expected = _count_text(shape[0] * shape[1])
        wrong(f"{len(data)} numbers of data; shape {_shape_text(shape)} takes {expected}")
    if not set(map(type, data)) <= {int, float}:
        wrong("data holds something that is not a number")
    with np.errstate(over="ignore"):
        array = _rounded(kind, data)
    tensor = TensorData(kind.name, shape, array.tobytes())
    if not all_finite(tensor):
        wrong(f"holds a number beyond the range of {kind.name}")
    return tensor


def numbers(tensor: TensorData) -> Array:
    """The tensor's elements for JSON, flat and in a dtype that orjson writes."""
    kind = DATATYPES[DATATYPE_OF[tensor.dtype]]
    array = np.frombuffer(tensor.data, kind.numpy)
    if kind.name == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array, requirements=["C", "A"])


def _rounded(kind: Datatype, data: list[int | float]) -> Array:
    if kind.name != "bfloat16":
        return np.array(data, dtype=kind.numpy)
    bits = np.array(data, dtype="<f4").view(np.uint32)
    # To nearest, ties to even, as hardware rounds.
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _shape_text(shape: object) -> str:
    if isinstance(shape, list | tuple) and len(shape) <= 4:
        return "[" + ", ".join(shown(size) for size in shape) + "]"
    return shown(shape)


def _count_text(count: int) -> str:
    return str(count) if count < 10**18 else "more than any machine has"
