"""Twenty minutes of mixed work at 80% of what the application can do: nothing may drift.

    python load_tests/soak.py [--preset tiny] [--minutes N] [--svg FILE] [--json FILE]

The embedded model, two expert groups, the default deployment but for caches so small that they are full before it
counts. The capacity is measured with a closed loop; then requests arrive at 0.8 times that (Poisson), whatever
became of those before. Memory, descriptors and threads of every process, and latencies, are sampled meanwhile; the
exit code is 1 when one of pimoe's processes drifts, ends, or answers wrongly, or when too many requests are
refused, late or never sent. See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from pimoe.clients import AsyncClient, Client, Limits
from process_usage import Usage, processes_below, usage
from report import machine, machine_line, parser, progress, publish
from soak_results import charts, tables, trends_of
from soak_verdict import Record, target_rows, verdicts
from soak_work import SHARES, Model, Outcome, Work
from stand import Stand, stand, supervised

GROUPS = 2
LOAD = 0.8
_MAX_OUTSTANDING = 1000
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Preset:
    """How long, and how often it is looked at.

    Attributes:
        warm_s: under the same load, before anything counts: until caches are full and every path was taken.
        window_s: latencies are summarised over so long.
        judges: whether it is long enough to tell a drift from a start.
    """

    capacity_s: float
    warm_s: float
    soak_s: float
    sample_s: float
    window_s: float
    callers: int
    judges: bool


PRESETS = {
    "tiny": Preset(2.0, 2.0, 8.0, sample_s=0.5, window_s=1.0, callers=8, judges=False),
    "default": Preset(20.0, 120.0, 1200.0, sample_s=5.0, window_s=20.0, callers=16, judges=True),
}
# So that whatever may grow has grown to its bound in the warm-up.
SMALL_CACHES = {
    "gateway": {"cache": {"max_bytes": 4 * 2**20}, "prompt_cache": {"max_bytes": 2**18, "max_entries": 256}},
    "router": {"engine": {"kv_blocks": 384}},
}


def model_of(url: str) -> tuple[Model, dict[int, str]]:
    """What is served, and pimoe's own processes."""
    with Client(url) as client:
        status = client.status()
    model = status["model"]
    names = {replica["pid"]: f"gateway {i}" for i, replica in enumerate(status["gateways"])}
    names |= {replica["pid"]: f"router {i}" for i, replica in enumerate(status["routers"])}
    names |= {replica["pid"]: group["name"] for group in status["groups"] for replica in group["replicas"]}
    return Model(model["name"], model["hidden_size"], tuple(model["moe_layers"]), model["vocab_size"]), names


async def _closed_loop(work: Work, callers: int, seconds: float) -> float:
    """Requests/s when `callers` ask again as soon as they are answered."""
    until = time.monotonic() + seconds
    done = 0

    async def caller() -> None:
        nonlocal done
        while (now := time.monotonic()) < until:
            outcome = await work.one(now)  # `done += await ...` would lose what others add meanwhile
            done += outcome.ended == "done"

    await asyncio.gather(*(caller() for _ in range(callers)))
    return done / seconds


async def _open_loop(work: Work, per_s: float, seconds: float, record: Record) -> None:
    """Send what is due, and note how it ended."""
    random = np.random.default_rng(1)
    running: set[asyncio.Task[None]] = set()

    async def send(due: float) -> None:
        record.outcomes.append(await work.one(due))

    due, until = time.monotonic(), time.monotonic() + seconds
    while (due := due + float(random.exponential(1 / per_s))) < until:
        await asyncio.sleep(due - time.monotonic())
        if len(running) >= _MAX_OUTSTANDING:
            record.dropped.append(due)
            continue
        task = asyncio.create_task(send(due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def _sample(record: Record, root: int, every_s: float) -> None:
    """Look at every process now and then, until cancelled."""
    while True:
        now = time.monotonic() - record.started
        found = await asyncio.to_thread(_look, root)
        for pid, (name, used) in found.items():
            record.names.setdefault(pid, name)
            record.samples.setdefault(pid, []).append((now, used))
        await asyncio.sleep(every_s)


def _look(root: int) -> dict[int, tuple[str, Usage]]:
    below = processes_below(root)
    return {pid: (name, used) for pid, name in below.items() if (used := usage(pid)) is not None}


async def _soak(url: str, preset: Preset, model: Model, names: dict[int, str], root: int) -> tuple[float, Record]:
    limits = Limits(max_connections=_MAX_OUTSTANDING + 100)
    client = AsyncClient(url, timeout_s=_TIMEOUT_S, retries=0, limits=limits)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with client, aiohttp.ClientSession(timeout=timeout) as session:
        work = Work(url, client, session, model)
        progress("the capacity, in a closed loop")
        capacity = await _closed_loop(work, preset.callers, preset.capacity_s)
        progress(f"{capacity:.0f} requests/s; warming up at {LOAD:g} times that")
        await _open_loop(work, LOAD * capacity, preset.warm_s, Record(time.monotonic()))
        record = Record(time.monotonic(), names={**names, os.getpid(): "load generator"})
        progress(f"soaking for {preset.soak_s:g} s")
        sampling = asyncio.create_task(_sample(record, root, preset.sample_s))
        try:
            await _open_loop(work, LOAD * capacity, preset.soak_s, record)
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
    return capacity, record


def _cache_hits(url: str) -> dict[str, Any]:
    with Client(url) as client:
        found: dict[str, Any] = client.status()["cache"]
    return {name: found[name] for name in ("hits", "misses", "evictions", "bytes") if name in found}


def measure(cluster: Stand, preset: Preset, root: int) -> tuple[dict[str, Any], str, str]:
    """Facts, tables and the chart."""
    cluster.serve(None, GROUPS, SMALL_CACHES)
    model, own = model_of(cluster.url)
    capacity, record = _run(lambda: _soak(cluster.url, preset, model, own, root))
    cache = _cache_hits(cluster.url)
    trends = trends_of(record.names, record.samples, record.outcomes, record.started, preset.window_s)
    against = verdicts(trends, record, set(own), preset.judges)
    facts: dict[str, Any] = {
        "capacity_per_s": capacity,
        "offered_per_s": LOAD * capacity,
        "soak_s": preset.soak_s,
        "outcomes": _outcome_rows(record.outcomes),
        "dropped": len(record.dropped),
        "cache": cache,
        "trends": [asdict(trend) for trend in trends],
        "judged": preset.judges,
        "against": against,
        "drifts": bool(against),
        "targets": target_rows(trends, record, set(own), preset.judges),
    }
    chart = charts(record.names, record.samples, record.outcomes, record.started, preset.window_s, set(own))
    return facts, tables(facts, trends), chart


def _run(work: Callable[[], Coroutine[Any, Any, tuple[float, Record]]]) -> tuple[float, Record]:
    return asyncio.run(work())


def _outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    counts = Counter((outcome.kind, outcome.ended.partition(":")[0]) for outcome in outcomes)
    endings = ("done", "refused", "late", "failed")
    return [{"kind": kind, **{ending: counts[kind, ending] for ending in endings}} for kind in SHARES]


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here, root = PRESETS[options.preset], machine(), os.getppid()
    if options.minutes is not None:
        preset = replace(preset, soak_s=60 * options.minutes)
    with stand() as cluster:
        facts, text, chart = measure(cluster, preset, root)
    if options.svg is not None:
        Path(options.svg).write_text(chart)
    publish({"machine": here, "preset": options.preset, **facts}, f"{machine_line(here)}\n\n{text}", options.json)
    if facts["against"]:
        sys.exit(1)


if __name__ == "__main__":
    command_line = parser("Find what drifts in a long run.", PRESETS)
    command_line.add_argument("--minutes", type=float, help="how long to soak (the preset's)")
    command_line.add_argument("--svg", metavar="FILE", help="a chart of memory, descriptors and latencies")
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
