"""How many blocks the KV cache of an engine has."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConfigurationError
from ..model.kv_cache import KVLayout
from .limits import EngineLimits

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Of both versions of control groups: where, the limit, what is used, and what of that only caches files.
_GROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now: of a GPU as its driver says, else the system's and what the control group leaves
    of it; 1 GiB where neither is told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [value for value in (_available(), _left_in_group()) if value is not None]
    return min(found, default=2**30)


def count_blocks(limits: EngineLimits, layout: KVLayout, longest: int, dtype: torch.dtype, free: int) -> int:
    """Blocks of an engine.

    Args:
        longest: tokens of the longest sequence that may run.
        free: bytes that can be had.

    Raises:
        ConfigurationError: not even one block fits.
    """
    if limits.kv_blocks is not None:
        return limits.kv_blocks
    fitting = int(limits.kv_memory_fraction * free) // layout.block_bytes(limits.block_tokens, dtype)
    if fitting < 1:
        raise ConfigurationError(
            f"engine.kv_memory_fraction {limits.kv_memory_fraction} of {free} free bytes is less than one block "
            f"of {limits.block_tokens} tokens takes",
            "kv_memory_fraction",
        )
    # All that can run, and as much again for prefixes of what ran.
    return min(fitting, 2 * limits.max_sequences * -(-longest // limits.block_tokens))


def _available() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _left_in_group() -> int | None:
    for folder, limit, used, reclaimable in _GROUP_FILES:
        try:
            allowed = (_CGROUP / folder / limit).read_text().strip()
            if allowed == "max":
                return None
            # A checkpoint that was just read fills the group with cached files, which make room for whoever asks.
            stat = dict(line.split() for line in (_CGROUP / folder / "memory.stat").read_text().splitlines())
            taken = int((_CGROUP / folder / used).read_text()) - int(stat.get(reclaimable, 0))
            return max(0, int(allowed) - max(0, taken))
        except (OSError, ValueError):
            continue
    return None
