"""What priorities and deadlines are worth when twice as much comes as can be done.

    python load_tests/overload.py [--preset tiny] [--load 2.0] [--record FILE] [--json FILE]

One MoE layer, two expert groups, the default deployment, over HTTP. First its capacity is measured with a closed
loop; then three classes arrive open-loop (Poisson) at `--load` times that: interactive 0.3, default 0.7 and batch
1.0 parts of 2.0, all with the same timeout. Then the same application does the same with one FIFO queue of the
same size (`queue.order: fifo`). See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pimoe.clients import AsyncClient, DeadlineExceededError, Limits, OverloadedError, PimoeClientError
from pimoe.runtime.model.layer_model import write_layer_model
from report import machine, machine_line, parser, progress, publish, quantile, table
from stand import Stand, stand, supervised

HIDDEN, EXPERTS, TOP_K = 256, 8, 2
# Of all that is offered. The names are those of the API.
SHARES = {"interactive": 0.15, "default": 0.35, "batch": 0.5}
ORDERS = ("priority", "fifo")


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        inner: width of an expert; the wider, the less of the time is HTTP.
        request_tokens, batch_tokens: of one request, and of a full batch.
        capacity_s, load_s: how long each phase takes; the first `warm_s` of a load are not counted.
        timeout_batches: the timeout of every request, in full-batch service times.
    """

    inner: int = 8192
    request_tokens: int = 128
    batch_tokens: int = 1024
    capacity_s: float = 8.0
    load_s: float = 30.0
    warm_s: float = 5.0
    timeout_batches: float = 12.0


PRESETS = {
    "tiny": Preset(inner=2048, capacity_s=2.0, load_s=4.0, warm_s=1.0),
    "default": Preset(),
}


@dataclass(frozen=True)
class Capacity:
    """What the application does when it is never idle and never late.

    Attributes:
        tokens_per_s: answered.
        batch_s: how long a full batch takes at that rate.
        single_s: p50 latency of a request alone, HTTP and all.
    """

    tokens_per_s: float
    batch_s: float
    single_s: float


@dataclass(frozen=True)
class Outcome:
    """One request: when it was due, how it ended and when."""

    name: str
    due_s: float
    latency_s: float
    ended: str


@dataclass(frozen=True)
class Row:
    """What became of one class.

    Attributes:
        offered, in_time, refused, late, failed: requests; `late`: its time ran out.
        p50_s, p99_s: latency of those answered in time, from when they were due; None where none was.
        wait_p99_batches: p99 latency less the time of a full batch, in times of a full batch: what was waited.
    """

    name: str
    offered: int
    in_time: int
    refused: int
    late: int
    failed: int
    p50_s: float | None
    p99_s: float | None
    wait_p99_batches: float | None


@dataclass(frozen=True)
class Phase:
    """One order under load.

    Attributes:
        batch_s: how long a full batch took meanwhile; clients and HTTP want the same cores.
    """

    order: str
    batch_s: float
    rows: list[Row]


def write_model(folder: Path, inner: int) -> Path:
    """A layer with random experts, the same every time."""
    torch.manual_seed(0)
    shapes = {"gate_proj": (inner, HIDDEN), "up_proj": (inner, HIDDEN), "down_proj": (HIDDEN, inner)}
    experts = [
        {f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        for _ in range(EXPERTS)
    ]
    return write_layer_model(folder, gate=torch.randn(EXPERTS, HIDDEN), experts=experts, top_k=TOP_K)


def serve(cluster: Stand, model: Path, preset: Preset, order: str) -> None:
    """The default deployment with batches of the preset's size, and a queue of thirty of them."""
    router = {
        "batching": {"max_batch_tokens": preset.batch_tokens},
        "queue": {"max_tokens": 30 * preset.batch_tokens, "order": order},
    }
    cluster.serve(model, 2, {"router": router})


def hidden_states(preset: Preset) -> list[NDArray[np.float32]]:
    """A few different requests."""
    random = np.random.default_rng(0)
    return [random.standard_normal((preset.request_tokens, HIDDEN), dtype=np.float32) for _ in range(16)]


def patient_client(url: str, timeout_s: float = 60.0) -> AsyncClient:
    """A client that never waits for a connection and never tries again."""
    return AsyncClient(url, timeout_s=timeout_s, retries=0, limits=Limits(max_connections=4000))


async def measure_capacity(url: str, preset: Preset) -> Capacity:
    """With as many requests at once as fill four batches."""
    states = hidden_states(preset)
    async with patient_client(url) as client:
        for _ in range(4):
            await client.infer(states[0], cache=False)
        singles = []
        for index in range(20):
            started = time.monotonic()
            await client.infer(states[index % len(states)], cache=False)
            singles.append(time.monotonic() - started)
        until = time.monotonic() + preset.capacity_s
        answered = 0

        async def caller(index: int) -> None:
            nonlocal answered
            while time.monotonic() < until:
                await client.infer(states[index % len(states)], cache=False)
                answered += 1

        started = time.monotonic()
        await asyncio.gather(*(caller(index) for index in range(4 * preset.batch_tokens // preset.request_tokens)))
        tokens_per_s = answered * preset.request_tokens / (time.monotonic() - started)
    return Capacity(tokens_per_s, preset.batch_tokens / tokens_per_s, quantile(singles, 0.5))


def arrivals(preset: Preset, requests_per_s: float) -> list[tuple[float, str]]:
    """Seconds from the start and class of every request: a Poisson process for each class, the same every time."""
    random = np.random.default_rng(1)
    due = []
    for name, share in SHARES.items():
        count = int(random.poisson(requests_per_s * share * preset.load_s))
        due += [(float(at), name) for at in random.uniform(0, preset.load_s, count)]
    return sorted(due)


async def offer(url: str, preset: Preset, order: str, due: Sequence[tuple[float, str]], timeout_s: float) -> Phase:
    """Send every request when it is due, whatever became of those before it."""
    states = hidden_states(preset)
    async with patient_client(url, timeout_s) as client:
        await client.infer(states[0], cache=False)
        tokens_before = await computed_tokens(client)
        started = time.monotonic()

        async def send(index: int, due_s: float, name: str) -> Outcome:
            await asyncio.sleep(started + due_s - time.monotonic())
            ended = "in_time"
            try:
                await client.infer(states[index % len(states)], cache=False, priority=name, timeout_s=timeout_s)
            except OverloadedError:
                ended = "refused"
            except DeadlineExceededError:
                ended = "late"
            except PimoeClientError as error:
                ended = f"failed: {error.code}"
            latency_s = time.monotonic() - started - due_s
            if ended == "in_time" and latency_s > timeout_s:
                ended = "late"
            return Outcome(name, due_s, latency_s, ended)

        outcomes = await asyncio.gather(*(send(index, *each) for index, each in enumerate(due)))
        tokens_per_s = (await computed_tokens(client) - tokens_before) / (time.monotonic() - started)
    batch_s = preset.batch_tokens / tokens_per_s
    counted = [outcome for outcome in outcomes if outcome.due_s >= preset.warm_s]
    return Phase(order, batch_s, [row_of(name, counted, batch_s) for name in SHARES])


async def computed_tokens(client: AsyncClient) -> int:
    """Tokens in all batches so far."""
    routers = (await client.status())["routers"]
    return sum(router["statistics"]["batcher"]["tokens"] for router in routers)


def row_of(name: str, outcomes: Sequence[Outcome], batch_s: float) -> Row:
    """What became of a class."""
    mine = [outcome for outcome in outcomes if outcome.name == name]
    latencies = [outcome.latency_s for outcome in mine if outcome.ended == "in_time"]
    counts = {kind: sum(o.ended.startswith(kind) for o in mine) for kind in ("refused", "late", "failed")}
    p50_s, p99_s = (quantile(latencies, share) if latencies else None for share in (0.5, 0.99))
    waits = None if p99_s is None else max(0.0, p99_s / batch_s - 1.0)
    return Row(name, len(mine), len(latencies), **counts, p50_s=p50_s, p99_s=p99_s, wait_p99_batches=waits)


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    here, preset = machine(), PRESETS[options.preset]
    phases: list[Phase] = []
    with tempfile.TemporaryDirectory() as folder, stand() as cluster:
        model = write_model(Path(folder) / "layer", preset.inner)
        for order in ORDERS:
            serve(cluster, model, preset, order)
            if not phases:
                progress("measuring the capacity")
                capacity = asyncio.run(measure_capacity(cluster.url, preset))
                due = arrivals(preset, options.load * capacity.tokens_per_s / preset.request_tokens)
                timeout_s = preset.timeout_batches * capacity.batch_s
                record(options.record, due, preset, timeout_s)
            progress(f"{options.load:g} times the capacity, {order}")
            phases.append(asyncio.run(offer(cluster.url, preset, order, due, timeout_s)))
    goodput = {phase.order: sum(row.in_time for row in phase.rows) for phase in phases}
    facts = {
        "machine": here,
        "preset": options.preset,
        "load": options.load,
        "timeout_s": timeout_s,
        "capacity": asdict(capacity),
        "orders": [asdict(phase) for phase in phases],
        "goodput": goodput,
        "goodput_ratio": goodput["priority"] / goodput["fifo"] if goodput["fifo"] else None,
    }
    publish(facts, "\n\n".join((machine_line(here), tables(facts, phases))), options.json)


def record(target: str | None, due: Sequence[tuple[float, str]], preset: Preset, timeout_s: float) -> None:
    """The arrivals as JSON lines, for `simulate_batching.py --trace`."""
    if target is None:
        return
    priorities = {"interactive": 1.0, "default": 0.5, "batch": 0.0}
    with Path(target).open("w") as file:
        for time_s, name in due:
            line = {"time_s": time_s, "tokens": preset.request_tokens, "priority": priorities[name]}
            file.write(json.dumps({**line, "timeout_s": timeout_s}) + "\n")


def tables(facts: dict[str, Any], phases: Sequence[Phase]) -> str:
    """The classes under both orders, and what they come to."""
    capacity, goodput, ratio = facts["capacity"], facts["goodput"], facts["goodput_ratio"]
    header = (
        "order",
        "class",
        "offered",
        "in time",
        "share",
        "refused",
        "late",
        "failed",
        "p50",
        "p99",
        "p99 wait",
    )
    lines = []
    for phase in phases:
        for row in phase.rows:
            counts = (row.refused, row.late, row.failed)
            waits = "" if row.wait_p99_batches is None else f"{row.wait_p99_batches:.1f} batches"
            share = f"{row.in_time / max(1, row.offered):.0%}"
            start = (phase.order, row.name, str(row.offered), str(row.in_time), share)
            lines.append((*start, *map(str, counts), _ms(row.p50_s), _ms(row.p99_s), waits))
    title = (
        f"Overload: capacity {capacity['tokens_per_s']:,.0f} tokens/s, request alone "
        f"{_ms(capacity['single_s'])}; {facts['load']:g} times that offered, timeout {_ms(facts['timeout_s'])}"
    )
    # Of the other order it would tell nothing: most of what that begins is left by its callers half-way.
    batches = f"a full batch took {_ms(phases[0].batch_s)} under {phases[0].order}"
    sums = f"answered in time: priority {goodput['priority']}, fifo {goodput['fifo']}"
    ratio_text = f", ratio {ratio:.2f}" if ratio is not None else ""
    return f"{table(title, header, lines)}\n{batches}\n{sums}{ratio_text}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f} ms"


if __name__ == "__main__":
    command_line = parser("Measure priorities and deadlines under overload.", PRESETS)
    command_line.add_argument("--load", type=float, default=2.0, help="offered load over the capacity")
    command_line.add_argument("--record", metavar="FILE", help="write the arrivals there, for the simulator")
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
