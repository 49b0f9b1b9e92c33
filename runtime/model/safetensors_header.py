"""The header of a safetensors file, read and checked without touching the tensors.

Format: eight bytes little-endian length, that many bytes of JSON, then the tensors' bytes without a gap
(https://huggingface.co/docs/safetensors). A file cut off anywhere is found here, when it is opened, rather than
hours later when the expert at its end is first used.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors library

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """One file's tensors by name, and the header's bytes as they stand in the file."""

    raw: bytes
    file_bytes: int
    entries: dict[str, TensorEntry]


def read_header(file: Path) -> SafetensorsHeader:
    """Reads and checks the header of `file`.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file; the message names it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: truncated or no safetensors file (header of {length} bytes in a file of {size})"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    entries = _entries(file, raw, data_start=8 + length)
    _check_extent(file, entries, data_start=8 + length, size=size)
    return SafetensorsHeader(raw, size, entries)


def _entries(file: Path, raw: bytes, data_start: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: the safetensors header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is no JSON object")
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    return {name: _entry(file, name, value, data_start) for name, value in tensors.items()}


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        code, shape = value["dtype"], tuple(int(size) for size in value["shape"])
        begin, end = (int(offset) for offset in value["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: tensor {name!r}: malformed header entry {value!r}") from error
    dtype = DTYPES.get(code)
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name!r}: unknown dtype {code!r}; known: {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != nbytes:
        raise CheckpointError(
            f"{file}: tensor {name!r}: bytes {begin} to {end} do not hold {code} of shape {list(shape)}"
        )
    return TensorEntry(file, dtype, shape, data_start + begin, nbytes)


def _check_extent(file: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """The tensors must fill the file exactly: no byte missing, none shared, none left over."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset + entry.nbytes > size:
            missing = entry.offset + entry.nbytes - size
            raise CheckpointError(f"{file}: truncated; tensor {name!r} ends {missing} bytes behind its end")
        if entry.offset != position:
            raise CheckpointError(f"{file}: tensor {name!r} overlaps another or leaves a gap before it")
        position += entry.nbytes
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes behind the last tensor belong to none")
