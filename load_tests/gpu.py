"""pimoe.runtime on one GPU: the experts in the router's process, and in processes of their own on the same GPU.

    python load_tests/gpu.py [--preset tiny] [--device cpu] [--json FILE]

No Ray, no HTTP, no rival: `LocalRuntime` beside itself, the wide random model in bfloat16. Where torch finds no
CUDA device this says so and measures nothing; `--device cpu` runs the same on the processor, to try the script
itself. Ways take turns within every round. See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from generation import Way, by_router, machine_and_kernels, machine_lines, streaming
from pimoe.runtime.errors import PimoeError
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.loop_thread import new_event_loop
from pimoe.runtime.router.limits import RouterLimits
from random_model import Shape, write_random_model
from report import parser, progress, publish, table
from switch_engines import decode_rate, prefill_rate, random_prompts

_LIMITS_TEXT = """No rival runs on the GPU here: every ratio is of pimoe to pimoe in-process.
Not measured: pimoe over HTTP, whose replicas would have parts of the GPU; several GPUs.
Processes that share a GPU take turns on it unless NVIDIA's MPS runs; dispatches go through host memory."""


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        processes: of how many group processes each way besides in-process consists.
    """

    rounds: int
    sequences: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    processes: tuple[int, ...] = (2, 4)
    shape: Shape = field(default_factory=Shape)


_TINY_SHAPE = Shape(64, 2, 8, 2, 32, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=256, max_tokens=256)
PRESETS = {
    "tiny": Preset(1, (1, 4), prompt_tokens=16, max_tokens=8, processes=(2,), shape=_TINY_SHAPE),
    "default": Preset(3, (1, 8, 32, 128), prompt_tokens=128, max_tokens=64),
}


@dataclass(frozen=True)
class Rate:
    """Medians over rounds.

    Attributes:
        decode_per_s: tokens/s while all sequences decode.
        prefill_per_s: tokens/s of prompts, until the last sequence has its first token.
        decode_ratio: of `decode_per_s` to in-process: the median of the rounds' ratios.
    """

    sequences: int
    way: str
    decode_per_s: float
    prefill_per_s: float
    decode_ratio: float


def missing(device: str) -> str | None:
    """Why nothing can be measured on `device`; None where it can."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device on this machine"
    if "device" not in inspect.signature(LocalRuntime.start).parameters:
        return "LocalRuntime cannot be told a device"
    return None


def device_name(device: str) -> str:
    """What it is measured on."""
    if device == "cpu":
        return "the processor, to try the script"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


async def _start(stack: AsyncExitStack, folder: Path, preset: Preset, device: str) -> list[Way]:
    limits = RouterLimits(engine=EngineLimits(max_sequences=max(preset.sequences)))
    options: dict[str, Any] = {} if device == "cpu" else {"device": device}

    async def start(name: str, groups: int, isolation: Any) -> Way:
        runtime = await LocalRuntime.start(folder, groups, isolation, limits=limits, **options)
        await stack.enter_async_context(runtime)
        return Way(name, 1, streaming(by_router(runtime.router)))

    ways = [await start("in-process", 1, "in-process")]
    for count in preset.processes:
        ways.append(await start(f"{count} group processes", count, "processes"))
    return ways


async def _measure(preset: Preset, device: str) -> list[Rate]:
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        folder = write_random_model(Path(made), preset.shape)
        async with AsyncExitStack() as stack:
            progress("starting all ways")
            ways = await _start(stack, folder, preset, device)
            found: list[Rate] = []
            for sequences in preset.sequences:
                progress(f"{sequences} sequences")
                found += await _rates(ways, preset, sequences)
            return found


async def _rates(ways: list[Way], preset: Preset, sequences: int) -> list[Rate]:
    decode: dict[str, list[float]] = {way.name: [] for way in ways}
    prefill: dict[str, list[float]] = {way.name: [] for way in ways}
    for index in range(preset.rounds + 1):
        # Prompts that nobody asked before: known prefixes would not be computed again.
        seed = 1000 * sequences + index
        prompts = random_prompts(preset.shape.vocab_size, sequences, preset.prompt_tokens, seed)
        for way in ways[index % len(ways) :] + ways[: index % len(ways)]:
            answers = await way.ask(prompts, preset.max_tokens)
            if index:  # the first round warms up
                decode[way.name].append(decode_rate(answers))
                prefill[way.name].append(prefill_rate(prompts, answers))
    return list(_summarise(sequences, decode, prefill))


def _summarise(
    sequences: int, decode: Mapping[str, Sequence[float]], prefill: Mapping[str, Sequence[float]]
) -> Iterator[Rate]:
    first = next(iter(decode.values()))
    for way, rates in decode.items():
        ratio = statistics.median(rate / base for rate, base in zip(rates, first, strict=True))
        yield Rate(sequences, way, statistics.median(rates), statistics.median(prefill[way]), ratio)


def tables(rates: Sequence[Rate], where: str, preset: Preset) -> str:
    """For people, and what it does not say."""
    rows = [
        (
            str(rate.sequences),
            rate.way,
            f"{rate.decode_per_s:,.0f}",
            f"{rate.decode_ratio:.2f}x",
            f"{rate.prefill_per_s:,.0f}",
        )
        for rate in rates
    ]
    header = ("sequences", "way", "decode tokens/s", "to in-process", "prefill tokens/s")
    title = f"On {where}: prompts of {preset.prompt_tokens}, {preset.max_tokens} tokens each, bfloat16"
    worse = [
        f"pimoe is worse: {rate.way}, {rate.sequences} sequences: {rate.decode_ratio:.2f} of in-process"
        for rate in rates
        if rate.decode_ratio < 0.97
    ]
    return "\n\n".join([table(title, header, rows), "\n".join([*worse, _LIMITS_TEXT])])


def run(options: argparse.Namespace) -> None:
    """Measure and publish, or say why not."""
    preset, here, device = PRESETS[options.preset], machine_and_kernels(), options.device
    facts: dict[str, Any] = {"machine": here, "preset": options.preset, "device": None, "gpu": [], "targets": []}
    if (reason := missing(device)) is not None:
        text = f"No GPU was at hand: {reason}. Nothing was measured."
        publish({**facts, "skipped": {"GPU": reason}}, f"{machine_lines(here)}\n\n{text}", options.json)
        return
    torch.set_num_threads(1)
    where = device_name(device)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        rates = runner.run(_measure(preset, device))
    facts |= {"device": where, "gpu": [asdict(rate) for rate in rates]}
    publish(facts, f"{machine_lines(here)}\n\n{tables(rates, where, preset)}", options.json)


def main() -> int:
    """The command line."""
    command_line = parser("Measure pimoe.runtime on one GPU.", PRESETS)
    command_line.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    try:
        run(command_line.parse_args())
    except PimoeError as error:
        print(f"error [{error.code}] {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
