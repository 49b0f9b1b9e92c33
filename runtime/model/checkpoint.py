"""A Hugging Face checkpoint folder: its config and its tensors, read one by one and only when asked for.

It knows files, names and bytes. What the tensors mean is the business of `families` and `decoder`. Nothing
is ever unpickled: a folder with only `.bin` weights is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_header import SafetensorsHeader, TensorEntry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CHUNK_BYTES = 8 * 1024 * 1024


class Checkpoint:
    """An opened checkpoint folder. Opening reads `config.json` and the safetensors headers, nothing else, and
    finds missing and truncated files. Reading opens its file anew, so that any thread may read.

    Args:
        folder: holds config.json and model.safetensors, or shards listed in model.safetensors.index.json.

    Raises:
        CheckpointError: anything missing, malformed or truncated; the message names the file and the tensor.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        self.config: Mapping[str, Any] = self._json("config.json")
        self._headers, self._entries = self._open_files()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the files."""
        return tuple(self._entries)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises CheckpointError where there is none of that name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the tensor is stored. Raises CheckpointError where there is none of that name."""
        return self._entry(name).dtype

    def read(
        self, name: str, dtype: torch.dtype | None = None, expected_shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """One tensor, on the CPU, in memory of its own; only its bytes are read.

        Args:
            name: the tensor's name.
            dtype: converted to this; None keeps the stored one.
            expected_shape: checked before anything is read.

        Raises:
            CheckpointError: no such tensor, another shape, or the file changed since it was opened.
        """
        entry = self._checked(name, expected_shape)
        tensor = _read_bytes(name, entry, 0, entry.nbytes).view(entry.dtype).view(entry.shape)
        return tensor if dtype is None else tensor.to(dtype)

    def read_slice(
        self,
        name: str,
        start: int,
        stop: int,
        dtype: torch.dtype | None = None,
        expected_shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """`tensor[start:stop]` along the first dimension, as `read`; only the bytes of those rows are read.

        Args:
            start, stop: `0 <= start <= stop <= shape[0]`.
            expected_shape: that of the whole tensor.

        Raises:
            CheckpointError: as `read`, and for rows that the tensor does not have.
        """
        entry = self._checked(name, expected_shape)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} of shape {list(entry.shape)} has no rows {start} to {stop}"
            )
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        raw = _read_bytes(name, entry, start * row_bytes, (stop - start) * row_bytes)
        tensor = raw.view(entry.dtype).view(stop - start, *entry.shape[1:])
        return tensor if dtype is None else tensor.to(dtype)

    def optional_json(self, file_name: str) -> Mapping[str, Any] | None:
        """A JSON object beside the weights, such as `generation_config.json`; None where there is no such file.

        Raises:
            CheckpointError: the file is there and is no JSON object.
        """
        return self._json(file_name) if (self.folder / file_name).exists() else None

    def fingerprint(self) -> str:
        """SHA-256 over file names, sizes, safetensors headers and config.json: quick, whatever the model's size.
        Two checkpoints of one architecture that differ in weights only may share it; `digest` never does."""
        hasher = hashlib.sha256()
        for file, header in sorted(self._headers.items()):
            _update(hasher, file.name.encode(), str(header.file_bytes).encode(), header.raw)
        _update(hasher, b"config.json", self._bytes("config.json"))
        return hasher.hexdigest()

    def digest(self) -> str:
        """SHA-256 over the whole contents of config.json and of every safetensors file, in order of names.

        Raises:
            CheckpointError: a file cannot be read.
        """
        hasher = hashlib.sha256()
        _update(hasher, b"config.json", self._bytes("config.json"))
        for file, header in sorted(self._headers.items()):
            _update(hasher, file.name.encode(), str(header.file_bytes).encode())
            for chunk in _chunks(file):
                hasher.update(chunk)
        return hasher.hexdigest()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: no tensor {name!r} in any safetensors file") from None

    def _checked(self, name: str, expected_shape: tuple[int, ...] | None) -> TensorEntry:
        entry = self._entry(name)
        if expected_shape is not None and entry.shape != tuple(expected_shape):
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}, expected {list(expected_shape)}"
            )
        return entry

    def _bytes(self, file_name: str) -> bytes:
        try:
            return (self.folder / file_name).read_bytes()
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder / file_name}: no such file") from None
        except OSError as error:
            raise CheckpointError(f"{self.folder / file_name}: cannot be read ({error})") from error

    def _json(self, file_name: str) -> Mapping[str, Any]:
        try:
            value = json.loads(self._bytes(file_name))
        except ValueError as error:
            raise CheckpointError(f"{self.folder / file_name}: no valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.folder / file_name}: must hold a JSON object")
        return value

    def _open_files(self) -> tuple[dict[Path, SafetensorsHeader], dict[str, TensorEntry]]:
        if (self.folder / SINGLE_FILE).exists():
            header = read_header(self.folder / SINGLE_FILE)
            return {self.folder / SINGLE_FILE: header}, header.entries
        if (self.folder / INDEX_FILE).exists():
            return self._open_shards()
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt")):
            raise CheckpointError(
                f"{self.folder}: only pickled weights (.bin, .pt), which are never loaded because they can run "
                f"code; convert them to safetensors (save_pretrained in transformers writes it)"
            )
        raise CheckpointError(f"{self.folder}: neither {SINGLE_FILE} nor {INDEX_FILE}")

    def _open_shards(self) -> tuple[dict[Path, SafetensorsHeader], dict[str, TensorEntry]]:
        index_file = self.folder / INDEX_FILE
        weight_map = self._json(INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_file}: 'weight_map' must be an object of tensor names to file names")
        for file_name in weight_map.values():
            # An index must not lead out of the folder.
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise CheckpointError(f"{index_file}: {file_name!r} is no file name")
        headers = {self.folder / name: read_header(self.folder / name) for name in set(weight_map.values())}
        entries = {}
        for name, file_name in weight_map.items():
            entry = headers[self.folder / file_name].entries.get(name)
            if entry is None:
                raise CheckpointError(f"{self.folder / file_name}: no tensor {name!r}, which the index promises")
            entries[name] = entry
        return headers, entries


def _read_bytes(name: str, entry: TensorEntry, offset: int, nbytes: int) -> Tensor:
    """`nbytes` bytes from byte `offset` of a tensor, as uint8."""
    # Read rather than mapped: a mapping that someone truncates kills the process with SIGBUS.
    raw = torch.empty(nbytes, dtype=torch.uint8)
    try:
        with entry.file.open("rb", buffering=0) as stream:
            _read_into(stream, entry.offset + offset, raw.numpy().data)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{entry.file}: tensor {name!r} cannot be read ({error})") from error
    return raw


def _read_into(stream: Any, offset: int, buffer: memoryview) -> None:
    stream.seek(offset)
    while buffer:
        count = stream.readinto(buffer)
        if not count:
            raise EOFError("the file became shorter after it was opened")
        buffer = buffer[count:]


def _update(hasher: Any, *parts: bytes) -> None:
    """Hashes each part with its length, so that no two different lists of parts hash alike."""
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
