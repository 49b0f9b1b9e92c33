"""What the processes of an application use: memory, file descriptors, threads. Linux only, from /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pimoe.deployments.processes import descendants

_RAY_TITLE = "ray::"


@dataclass(frozen=True)
class Usage:
    """One process at one moment.

    Attributes:
        rss_bytes: resident, what is shared counted in full.
        pss_bytes: resident, of what is shared its part only; so it adds up over processes.
        uss_bytes: what nobody shares: what would be free again if it ended.
    """

    rss_bytes: int
    pss_bytes: int
    uss_bytes: int
    descriptors: int
    threads: int


def usage(pid: int) -> Usage | None:
    """What a process uses; None where it ended, or belongs to another user."""
    try:
        fields = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
        return Usage(
            rss_bytes=1024 * fields["Rss"],
            pss_bytes=1024 * fields["Pss"],
            uss_bytes=1024 * (fields["Private_Clean"] + fields["Private_Dirty"]),
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=len(os.listdir(f"/proc/{pid}/task")),
        )
    except (OSError, KeyError):
        return None


def processes_below(pid: int) -> dict[int, str]:
    """Names of `pid` and of all processes below it."""
    found = {each: name_of(each) for each in (pid, *descendants(pid))}
    return {each: name for each, name in found.items() if name is not None}


def total_pss_bytes(pids: Iterable[int]) -> int:
    """What the machine would have more without these processes."""
    return sum(found.pss_bytes for pid in pids if (found := usage(pid)) is not None)


def name_of(pid: int) -> str | None:
    """What a process is: the title that Ray gave it, else its program, with the script of an interpreter.
    None where it ended."""
    words: list[str] = []
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    if not words or not words[0]:
        return None
    if words[0].startswith(_RAY_TITLE):
        return words[0].strip()
    program = Path(words[0].split()[0]).name
    if not program.startswith("python"):
        return program
    scripts = [word for word in words[1:] if word.endswith(".py") or word.startswith(("pimoe.", "ray."))]
    return "/".join(Path(scripts[0]).parts[-2:]) if scripts else program


def _kilobytes(text: str) -> dict[str, int]:
    """Lines such as `Pss:   12 kB`."""
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
