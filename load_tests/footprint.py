"""How long `pimoe serve` takes to its first answer, and what its processes hold in memory.

    python load_tests/footprint.py [--preset tiny] [--model FOLDER|embedded|wide] [--groups N] [--json FILE]

Start-up is that of the command itself, as a user runs it, phase by phase; its files were read before. Memory is
measured beside two replicas that do nothing, in the same cluster: an empty one, and one that has only imported
torch. See README.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from generation import EMBEDDED, WIDE, Model, add_model_options, chosen_models
from pimoe.clients import Client
from pimoe.deployments.cluster import free_port
from process_usage import Usage, name_of, processes_below, total_pss_bytes, usage
from report import machine, machine_line, parser, progress, publish, table
from stand import QUIET, Stand, stand, supervised

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0
_PROMPT = [1, 2, 3]
# What `pimoe serve` prints when a phase ends, and which.
_ENDINGS = (
    ("starting Ray ...", "command"),
    ("starting Ray Serve", "Ray"),
    ("starting the gateway", "controller"),
    ("linking them", "replicas, proxies"),
    ("is served at", "links"),
)
PHASES = (*(phase for _, phase in _ENDINGS), "first answer")


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        starts: of the command, for each model; models take turns.
        work_sequences, work_tokens: generated before memory is read the second time.
    """

    starts: int
    models: tuple[str, ...]
    work_sequences: int
    work_tokens: int


PRESETS = {
    "tiny": Preset(1, (EMBEDDED,), work_sequences=4, work_tokens=8),
    "default": Preset(3, (EMBEDDED, WIDE), work_sequences=32, work_tokens=64),
}


@dataclass(frozen=True)
class Start:
    """One phase of starting; medians over starts.

    Attributes:
        until_s: from the command's start to the end of this phase.
    """

    model: str
    phase: str
    seconds: float
    until_s: float


@dataclass(frozen=True)
class Held:
    """Memory of one kind of process; bytes.

    Attributes:
        processes: how many of the kind; the numbers are the largest of them.
        weights_bytes: of the model's, those it holds; None for what holds none.
        worked_uss_bytes: USS after the work, that is with its buffers, caches and KV blocks.
        over_empty_bytes, over_torch_bytes: USS less that of the replica that does nothing, or only imported torch,
            and less the weights; None for what is no replica of pimoe's, and for a gateway, which has no torch.
    """

    model: str
    process: str
    processes: int
    rss_bytes: int
    pss_bytes: int
    uss_bytes: int
    worked_uss_bytes: int
    weights_bytes: int | None = None
    over_empty_bytes: int | None = None
    over_torch_bytes: int | None = None


# Start-up ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """One start of the command.

    Attributes:
        ends: seconds from its start to the end of every phase.
        command_pss_bytes: of `pimoe serve` itself, its supervisor included, after the first answer.
        all_pss_bytes: of that and all that it started.
    """

    ends: dict[str, float]
    command_pss_bytes: int
    all_pss_bytes: int


def start_once(folder: Path | None, groups: int) -> Started:
    """Run `pimoe serve` until its first answer.

    Raises:
        RuntimeError: it ended, or said something else.
        TimeoutError: it did not start.
    """
    port = free_port()
    model = [] if folder is None else [str(folder)]
    command = [sys.executable, "-m", "pimoe.deployments.command", "serve", *model]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--groups", str(groups), "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "COLUMNS": "200"},  # no line is folded
            start_new_session=True,
        )
        try:
            ends = _read_phases(process, started)
            with Client(f"http://127.0.0.1:{port}") as client:
                client.generate(_PROMPT, max_tokens=1, cache=False)
            ends[PHASES[-1]] = time.monotonic() - started
            below = processes_below(process.pid)
            own = [pid for pid, name in below.items() if name == name_of(process.pid)]
            return Started(ends, total_pss_bytes(own), total_pss_bytes(below))
        except RuntimeError as error:
            errors.seek(0)
            raise RuntimeError(f"{error}: {errors.read()[-2000:]}") from None
        finally:
            _stop(process)


def _read_phases(process: subprocess.Popen[str], started: float) -> dict[str, float]:
    ends: dict[str, float] = {}
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as reader:
        for text, phase in _ENDINGS:
            line = ""
            while text not in line:
                left_s = _START_TIMEOUT_S - (time.monotonic() - started)
                try:
                    line = reader.submit(process.stdout.readline).result(left_s)
                except TimeoutError:
                    process.kill()  # and so ends what the reader waits for
                    raise TimeoutError(f"pimoe serve was not up within {_START_TIMEOUT_S:g} s") from None
                if not line:
                    raise RuntimeError(f"pimoe serve ended before it said {text!r}")
            ends[phase] = time.monotonic() - started
    return ends


def _stop(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C does; its supervisor ends all that it started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def measure_starts(preset: Preset, models: Sequence[Model], groups: int) -> dict[str, list[Started]]:
    """Every model in turn."""
    found: dict[str, list[Started]] = {model.name: [] for model in models}
    for index in range(preset.starts):
        for model in models:
            progress(f"start {index + 1} of {preset.starts}: pimoe serve, {model.name}")
            found[model.name].append(start_once(model.folder, groups))
    return found


def summarise_starts(model: str, starts: Sequence[Started]) -> list[Start]:
    """Medians over starts, phase by phase."""
    rows = []
    for before, phase in zip((None, *PHASES), PHASES, strict=False):
        lengths = [start.ends[phase] - (start.ends[before] if before else 0.0) for start in starts]
        until = statistics.median(start.ends[phase] for start in starts)
        rows.append(Start(model, phase, statistics.median(lengths), until))
    return rows


# Memory --------------------------------------------------------------------------------------------------------


def _deploy_empty() -> dict[str, int]:
    """Two replicas that do nothing; their process ids by what they imported."""
    from ray import serve

    class Empty:
        def __init__(self, module: str | None) -> None:
            if module is not None:
                __import__(module)

        def pid(self) -> int:
            return os.getpid()

    pids = {}
    for name, module in (("empty", None), ("torch", "torch")):
        deployment: Any = serve.deployment(Empty, name=name, ray_actor_options={"num_cpus": 0})
        application = deployment.bind(module)
        handle = serve.run(application, name=f"nothing-{name}", route_prefix=f"/{name}", logging_config=QUIET)
        pids[name] = int(handle.pid.remote().result())
    return pids


def _work(url: str, preset: Preset) -> None:
    with Client(url) as client, ThreadPoolExecutor(preset.work_sequences) as threads:
        prompts = [[(index + step) % 250 + 1 for step in range(16)] for index in range(preset.work_sequences)]
        calls = [
            threads.submit(
                client.generate, prompt, max_tokens=preset.work_tokens, temperature=0, ignore_eos=True, cache=False
            )
            for prompt in prompts
        ]
        for call in calls:
            call.result()


def _replicas(url: str) -> dict[int, tuple[str, int | None]]:
    """Deployment and weights of each of pimoe's replicas, by process id."""
    with Client(url) as client:
        status = client.status()
    found: dict[int, tuple[str, int | None]] = {}
    for gateway in status["gateways"]:
        found[gateway["pid"]] = ("gateway", None)
    for router in status["routers"]:
        found[router["pid"]] = ("router", router["weights_bytes"])
    for group in status["groups"]:
        for replica in group["replicas"]:
            found[replica["pid"]] = ("expert group", replica["weights_bytes"])
    return found


def measure_memory(preset: Preset, model: Model, groups: int, cluster: Stand, root: int) -> list[Held]:
    """Memory by kind of process below `root`, but for this one."""
    progress(f"memory, {model.name}")
    cluster.serve(model.folder, groups)
    empty = _deploy_empty()
    replicas = _replicas(cluster.url)
    _work(cluster.url, Preset(1, (), 1, 1))  # every path once, so that nothing is read for the first time
    names = {pid: name for pid, name in processes_below(root).items() if pid not in (root, os.getpid())}
    before = {pid: found for pid in names if (found := usage(pid)) is not None}
    _work(cluster.url, preset)
    after = {pid: found for pid in names if (found := usage(pid)) is not None}
    return summarise_memory(model.name, names, replicas, empty, before, after)


def summarise_memory(
    model: str,
    names: dict[int, str],
    replicas: dict[int, tuple[str, int | None]],
    empty: dict[str, int],
    before: dict[int, Usage],
    after: dict[int, Usage],
) -> list[Held]:
    """The largest process of each kind: pimoe's own, those that do nothing, and Ray's."""
    kinds: dict[str, list[int]] = {}
    of_empty = {pid: f"replica with {name}" if name != "empty" else "empty replica" for name, pid in empty.items()}
    for pid in sorted(before.keys() & after.keys()):
        kind = replicas[pid][0] if pid in replicas else of_empty.get(pid, names[pid])
        kinds.setdefault(kind, []).append(pid)
    rows = []
    for kind, pids in kinds.items():
        pid = max(pids, key=lambda each: before[each].pss_bytes)
        held = before[pid]
        weights = replicas[pid][1] if pid in replicas else None
        over: list[int | None] = [None, None]
        if pid in replicas:
            own = held.uss_bytes - (weights or 0)
            over = [
                own - before[empty["empty"]].uss_bytes,
                None if weights is None else own - before[empty["torch"]].uss_bytes,
            ]
        numbers = (held.rss_bytes, held.pss_bytes, held.uss_bytes, after[pid].uss_bytes)
        rows.append(Held(model, kind, len(pids), *numbers, weights, *over))
    order = ("expert group", "router", "gateway", "empty replica", "replica with torch")
    return sorted(rows, key=lambda row: order.index(row.process) if row.process in order else len(order))


# The command line ----------------------------------------------------------------------------------------------


def tables(rows: Sequence[Start], command: Mapping[str, Mapping[str, int]], held: Sequence[Held]) -> str:
    """For people: one table of starts, and one of memory for each model."""
    by_phase = {(row.model, row.phase): row for row in rows}
    lines = []
    for phase in PHASES:
        found = [by_phase[model, phase] for model in command]
        lines.append([phase, *(f"{row.seconds:.2f}" for row in found), *(f"{row.until_s:.2f}" for row in found)])
    header = ["phase", *(f"{model} s" for model in command), *(f"{model}, until s" for model in command)]
    parts = [table("Start-up: pimoe serve to the first answer", header, lines)]
    for model, own in command.items():
        title = (
            f"Memory in MB, {model} model (of pimoe serve: {own['all_pss_bytes'] / 1e6:,.0f} MB of PSS in all its "
            f"processes, {own['command_pss_bytes'] / 1e6:,.0f} MB in the command itself)"
        )
        parts.append(table(title, _HELD_HEADER, [_held_line(row) for row in held if row.model == model]))
    return "\n\n".join(parts)


_HELD_HEADER = (
    "process",
    "number",
    "RSS",
    "PSS",
    "USS",
    "after work",
    "weights",
    "over empty",
    "over torch",
)


def _held_line(row: Held) -> tuple[str, ...]:
    numbers = (
        row.rss_bytes,
        row.pss_bytes,
        row.uss_bytes,
        row.worked_uss_bytes,
        row.weights_bytes,
        row.over_empty_bytes,
        row.over_torch_bytes,
    )
    return row.process[:40], str(row.processes), *("" if each is None else f"{each / 1e6:.1f}" for each in numbers)


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here, root = PRESETS[options.preset], machine(), os.getppid()
    held: list[Held] = []
    options.model = options.model or list(preset.models)
    with chosen_models(options) as models:
        started = measure_starts(preset, models, options.groups)
        for model in models:
            # A cluster for each: what another model left in Ray's processes is none of this one's.
            with stand() as cluster:
                held += measure_memory(preset, model, options.groups, cluster, root)
    rows = [row for name, starts in started.items() for row in summarise_starts(name, starts)]
    command = {name: _memory_of(starts) for name, starts in started.items()}
    facts: dict[str, Any] = {
        "machine": here,
        "preset": options.preset,
        "groups": options.groups,
        "start_up": [asdict(row) for row in rows],
        "command": command,
        "memory": [asdict(row) for row in held],
        "targets": [],
    }
    publish(facts, f"{machine_line(here)}\n\n{tables(rows, command, held)}", options.json)


def _memory_of(starts: Sequence[Started]) -> dict[str, int]:
    names = ("command_pss_bytes", "all_pss_bytes")
    return {name: int(statistics.median(getattr(start, name) for start in starts)) for name in names}


if __name__ == "__main__":
    command_line = parser("Measure start-up and memory of the served application.", PRESETS)
    add_model_options(command_line)
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
