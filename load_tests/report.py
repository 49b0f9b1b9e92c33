"""What the load tests share: their command line, the machine they ran on, statistics, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("pimoe", "torch", "ray", "numpy", "uvloop", "aiohttp")
DEFAULT_PRESET = "default"


def parser(description: str, presets: Iterable[str]) -> argparse.ArgumentParser:
    """A command line with the options of every load test: `--preset` and `--json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=list(presets), default=DEFAULT_PRESET)
    parser.add_argument("--json", metavar="FILE", help="write the results there ('-': standard output, no tables)")
    return parser


def publish(facts: dict[str, Any], text: str, target: str | None) -> None:
    """Print the tables, or the JSON where it goes to standard output."""
    if target == "-":
        print(json.dumps(facts, indent=2))
        return
    print(text)
    if target is not None:
        Path(target).write_text(json.dumps(facts, indent=2) + "\n")


_started = time.monotonic()


def progress(step: str) -> None:
    """A line for whoever waits; standard output is for results."""
    print(f"{time.monotonic() - _started:6.1f} s  {step}", file=sys.stderr, flush=True)


# The machine ---------------------------------------------------------------------------------------------------


def machine(more_packages: Iterable[str] = ()) -> dict[str, Any]:
    """Where this runs. The load average is as of now: what else ran tells how far to trust the numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in (*PACKAGES, *more_packages) if (found := _version(name)) is not None},
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """`machine` in one line."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['system']}, "
        f"load average {machine['load_average']} at the start; Python {machine['python']}, {versions}"
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Statistics ----------------------------------------------------------------------------------------------------


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def median_quantile(rounds: Sequence[Sequence[float]], share: float) -> float:
    """The median over rounds of each round's quantile: one disturbed round moves it little."""
    return statistics.median(quantile(samples, share) for samples in rounds)


# Targets -------------------------------------------------------------------------------------------------------


def target(
    what: str, ratio: float, wanted: float, at_most: bool = False, unit: str = "x", digits: int = 2
) -> dict[str, Any]:
    """One of the "targets" among a script's facts, reached or missed."""
    return {
        "what": what,
        "target": f"{'at most' if at_most else 'at least'} {wanted:g}{unit}",
        "measured": f"{ratio:.{digits}f}{unit}",
        "value": ratio,
        "reached": ratio <= wanted if at_most else ratio >= wanted,
    }


def target_table(targets: Sequence[dict[str, Any]], title: str = "Targets") -> str:
    """For people. What is neither reached nor missed (None) was not judged."""
    verdicts = {True: "reached", False: "MISSED", None: "not judged"}
    rows = [
        (*(str(row[name]) for name in ("what", "target", "measured")), verdicts[row["reached"]]) for row in targets
    ]
    return table(title, ("what", "target", "measured", ""), rows)


# Tables --------------------------------------------------------------------------------------------------------


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; those of numbers to the right, those of words to the left."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = zip(cells, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in aligned).rstrip()

    return "\n".join([title, line(header), line(["-" * width for width in widths]), *map(line, rows)])
