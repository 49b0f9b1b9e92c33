"""How many blocks the KV cache has, and what memory there is for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pimoe.runtime.errors import ConfigurationError
from pimoe.runtime.generation import kv_memory
from pimoe.runtime.generation.kv_memory import count_blocks, free_bytes
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.model.kv_cache import KVLayout

GIB = 2**30
CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=2, num_kv_heads=4, key_dim=8, value_dim=8)
BLOCK_BYTES = 2 * 16 * 4 * 16 * 4  # layers, tokens, heads, both dims, float32


def count(free: int, longest: int = 1000, dtype: torch.dtype = torch.float32, **limits: float) -> int:
    return count_blocks(EngineLimits(**limits), LAYOUT, longest, dtype, free)  # type: ignore[arg-type]


def test_given_blocks_are_taken_as_they_are() -> None:
    assert count(0, kv_blocks=7) == 7


def test_blocks_fill_the_fraction_of_the_free_memory() -> None:
    assert LAYOUT.block_bytes(16, torch.float32) == BLOCK_BYTES
    assert count(100 * BLOCK_BYTES, kv_memory_fraction=0.5) == 50
    assert count(100 * BLOCK_BYTES + 1, kv_memory_fraction=0.5) == 50
    assert count(100 * BLOCK_BYTES, kv_memory_fraction=0.5, dtype=torch.bfloat16) == 100
    assert count(100 * BLOCK_BYTES, kv_memory_fraction=0.5, block_tokens=8) == 100


def test_no_more_than_twice_what_can_run() -> None:
    assert count(10**12, longest=100, max_sequences=3) == 2 * 3 * 7
    assert count(10**12, longest=96, max_sequences=3) == 2 * 3 * 6


def test_not_even_one_block_is_refused() -> None:
    assert count(4 * BLOCK_BYTES) == 1
    with pytest.raises(ConfigurationError, match="is less than one block of 16 tokens takes") as caught:
        count(4 * BLOCK_BYTES - 1)
    assert caught.value.param == "kv_memory_fraction"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system that tells what the files say that a test writes."""
    monkeypatch.setattr(kv_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(kv_memory, "_CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup/memory").mkdir(parents=True)
    return tmp_path


def write_group(system: Path, limit: str, used: int, cached: int) -> None:
    (system / "cgroup/memory.max").write_text(f"{limit}\n")
    (system / "cgroup/memory.current").write_text(f"{used}\n")
    (system / "cgroup/memory.stat").write_text(f"anon 5\nfile 9\ninactive_file {cached}\nactive_file 3\n")


def test_the_system_tells_what_is_available(system: Path) -> None:
    (system / "meminfo").write_text("MemTotal:  16000000 kB\nMemFree: 100 kB\nMemAvailable:    2048 kB\n")
    assert free_bytes(CPU) == 2048 * 1024


@pytest.mark.parametrize("limit", ["8589934592", "max"])
def test_the_smaller_of_system_and_group_counts(system: Path, limit: str) -> None:
    (system / "meminfo").write_text(f"MemAvailable: {16 * GIB // 1024} kB\n")
    write_group(system, limit, 3 * GIB, 0)
    assert free_bytes(CPU) == (16 * GIB if limit == "max" else 5 * GIB)
    (system / "meminfo").write_text(f"MemAvailable: {GIB // 1024} kB\n")
    assert free_bytes(CPU) == GIB


def test_files_that_are_only_cached_make_room(system: Path) -> None:
    """The checkpoint was just read: what it left in memory must not be counted as used."""
    write_group(system, str(8 * GIB), 8 * GIB, 6 * GIB)
    assert free_bytes(CPU) == 6 * GIB
    write_group(system, str(8 * GIB), 9 * GIB, 0)
    assert free_bytes(CPU) == 0


def test_older_groups_tell_it_elsewhere(system: Path) -> None:
    folder = system / "cgroup/memory"
    (folder / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {2 * GIB}\n")
    assert free_bytes(CPU) == 3 * GIB
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (system / "meminfo").write_text(f"MemAvailable: {GIB // 1024} kB\n")
    assert free_bytes(CPU) == GIB


@pytest.mark.parametrize("broken", ["", "MemAvailable:\n", "MemAvailable: much kB\n"])
def test_where_nothing_is_told_a_gibibyte_is_assumed(system: Path, broken: str) -> None:
    (system / "meminfo").write_text(broken)
    (system / "cgroup/memory.max").write_text("a lot\n")
    assert free_bytes(CPU) == GIB


def test_this_machine_tells_something() -> None:
    assert free_bytes(CPU) > 0
