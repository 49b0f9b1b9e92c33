"""Reading checkpoint folders: every tensor as stored, and every damage found and named."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pimoe.runtime.errors import CheckpointError
from pimoe.runtime.model.checkpoint import Checkpoint
from safetensors.torch import save_file

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.half": torch.randn(5, dtype=torch.float32).to(torch.bfloat16),
    "c.scalar": torch.tensor(7, dtype=torch.int64),
    "d.empty": torch.empty(0, 3, dtype=torch.float16),
    "e.flags": torch.tensor([True, False]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "test"}')
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    files = {"a.weight": "one.safetensors", "b.half": "two.safetensors"}
    for name, file in files.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def rewrite_header(file: Path, change: Callable[[dict[str, object]], None]) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def test_every_tensor_reads_as_it_was_written(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.names) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert checkpoint.has(name)
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.dtype(name) is expected.dtype
        actual = checkpoint.read(name, expected_shape=tuple(expected.shape))
        assert actual.dtype is expected.dtype
        assert torch.equal(actual, expected)
    assert not checkpoint.has("f")
    assert checkpoint.read("a.weight", torch.bfloat16).dtype is torch.bfloat16
    assert checkpoint.config == {"model_type": "test"}


def test_a_tensor_owns_its_memory(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    tensor = checkpoint.read("a.weight")
    tensor.add_(1)
    shutil.rmtree(folder)
    assert torch.equal(tensor, TENSORS["a.weight"] + 1)


def test_slices_read_only_their_rows(folder: Path) -> None:
    checkpoint, file = Checkpoint(folder), folder / "model.safetensors"
    entry = checkpoint._entry("a.weight")
    content = bytearray(file.read_bytes())
    content[entry.offset : entry.offset + 16] = b"\xff" * 16  # row 0, as NaN
    file.write_bytes(content)
    assert torch.equal(checkpoint.read_slice("a.weight", 1, 3), TENSORS["a.weight"][1:3])
    assert checkpoint.read_slice("a.weight", 0, 1).isnan().all()
    half = checkpoint.read_slice("a.weight", 2, 3, torch.bfloat16, expected_shape=(3, 4))
    assert half.dtype is torch.bfloat16
    assert torch.equal(half, TENSORS["a.weight"][2:3].bfloat16())
    assert checkpoint.read_slice("a.weight", 1, 1).shape == (0, 4)
    assert checkpoint.read_slice("d.empty", 0, 0).shape == (0, 3)
    os.truncate(file, entry.offset + 32)  # rows 0 and 1 are left
    assert torch.equal(checkpoint.read_slice("a.weight", 1, 2), TENSORS["a.weight"][1:2])
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight' cannot be read"):
        checkpoint.read_slice("a.weight", 2, 3)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 4), (2, 1), (4, 4)])
def test_rows_that_a_tensor_lacks_are_refused(folder: Path, start: int, stop: int) -> None:
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"'a.weight' of shape \[3, 4\] has no rows {start} to {stop}"):
        checkpoint.read_slice("a.weight", start, stop)
    with pytest.raises(CheckpointError, match=r"'c.scalar' of shape \[\] has no rows"):
        checkpoint.read_slice("c.scalar", 0, 1)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 4\], expected \[3, 5\]"):
        checkpoint.read_slice("a.weight", 0, 1, expected_shape=(3, 5))


def test_shards(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert checkpoint.names == ("a.weight", "b.half")
    assert torch.equal(checkpoint.read("b.half"), TENSORS["b.half"])


def test_optional_json(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.optional_json("generation_config.json") is None
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert checkpoint.optional_json("generation_config.json") == {"eos_token_id": 3}
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: must hold a JSON object"):
        checkpoint.optional_json("generation_config.json")


def test_digest_changes_with_any_byte_and_fingerprint_with_any_header(folder: Path) -> None:
    before = Checkpoint(folder)
    fingerprint, digest = before.fingerprint(), before.digest()
    assert (Checkpoint(folder).fingerprint(), Checkpoint(folder).digest()) == (fingerprint, digest)
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert Checkpoint(folder).fingerprint() == fingerprint
    assert Checkpoint(folder).digest() != digest
    (folder / "config.json").write_text('{"model_type": "other"}')
    assert Checkpoint(folder).fingerprint() != fingerprint


def test_digest_does_not_depend_on_the_folder(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copies") / "elsewhere"
    shutil.copytree(sharded, copy)
    assert Checkpoint(copy).digest() == Checkpoint(sharded).digest()
    assert Checkpoint(copy).fingerprint() == Checkpoint(sharded).fingerprint()


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 200, -1])
def test_a_file_cut_anywhere_is_found_when_opened(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        Checkpoint(folder)


def test_a_file_cut_after_it_was_opened_is_found_when_read(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'a\.weight'.*shorter"):
        checkpoint.read("a.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a.weight"].update(dtype="F4"), r"tensor 'a\.weight': unknown dtype 'F4'; known: F64"),
        (lambda h: h["a.weight"].update(shape=[3, 5]), r"tensor 'a\.weight': bytes .* do not hold F32 of shape"),
        (lambda h: h["a.weight"].update(shape="x"), r"tensor 'a\.weight': malformed"),
        (lambda h: h["a.weight"].pop("data_offsets"), r"tensor 'a\.weight': malformed"),
        (lambda h: h.update(b=5), "tensor 'b': malformed"),
        (lambda h: h["a.weight"].update(data_offsets=[4, 52]), "overlaps another or leaves a gap"),
        (lambda h: h.update(z={"dtype": "U8", "shape": [9], "data_offsets": [90, 99]}), "truncated|gap|overlaps"),
        (lambda h: h.pop("e.flags"), "belong to none"),
    ],
)
def test_a_lying_header_is_found(folder: Path, change: Callable[[dict[str, object]], None], message: str) -> None:
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_bytes_behind_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"smuggled")
    with pytest.raises(CheckpointError, match="8 bytes behind the last tensor"):
        Checkpoint(folder)


def test_headers_that_are_no_json(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 4) + b"{oh}" + b"\0" * 100)
    with pytest.raises(CheckpointError, match="header is no JSON"):
        Checkpoint(folder)
    file.write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        Checkpoint(folder)


def test_wrong_names_and_shapes(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for call in (checkpoint.shape, checkpoint.dtype, checkpoint.read):
        with pytest.raises(CheckpointError, match="no tensor 'missing'"):
            call("missing")
    with pytest.raises(CheckpointError, match=r"'a\.weight' has shape \[3, 4\], expected \[4, 3\]"):
        checkpoint.read("a.weight", expected_shape=(4, 3))


def test_missing_and_malformed_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint(folder / "nowhere")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Checkpoint(empty)
    (empty / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: no valid JSON"):
        Checkpoint(empty)
    (empty / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint(empty)
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        Checkpoint(empty)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": []}, "'weight_map' must be an object"),
        ({}, "'weight_map' must be an object"),
        ({"weight_map": {"a.weight": "three.safetensors"}}, r"three\.safetensors: cannot be read"),
        (
            {"weight_map": {"a.weight": "two.safetensors"}},
            r"two\.safetensors: no tensor 'a\.weight', which",
        ),
        ({"weight_map": {"a.weight": "../one.safetensors"}}, r"'\.\./one\.safetensors' is no file name"),
        ({"weight_map": {"a.weight": 3}}, "3 is no file name"),
    ],
)
def test_a_wrong_index_is_found(sharded: Path, index: object, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(sharded)


def test_a_truncated_shard_is_found(sharded: Path) -> None:
    file = sharded / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"two\.safetensors: truncated; tensor 'b\.half' ends 1 bytes"):
        Checkpoint(sharded)
