"""What it costs that experts live in other processes: the same engine in-process, in 2 and in 4 group processes.

    python load_tests/isolation_tax.py [--preset tiny] [--weights NAME] [--rounds N] [--json FILE] [--svg FILE]

No Ray, no HTTP: `LocalRuntime`. All ways are up at the same time and take turns. Afterwards such steps run
once more with a clock around each part, to say where a layer's time goes. See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from generation import (
    WEIGHTS,
    Way,
    by_router,
    machine_and_kernels,
    machine_lines,
    quantization,
    streaming,
    unknown_weights,
)
from generation_split import PARTS, split
from isolation_results import Parts, Results, Speed, chart, summary, tables, targets
from pimoe.runtime.errors import PimoeError
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.generation.micro_batches import MicroBatchStatistics
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.loop_thread import new_event_loop
from pimoe.runtime.router.limits import RouterLimits
from pimoe.runtime.router.router import Router
from random_model import Shape, write_random_model
from report import cores, parser, progress, publish, target_table
from rounds import take_turns
from switch_engines import Prompt, decode_rate, random_prompts
from switch_steps import BLOCK_TOKENS

_WARM_UP_ROUND = 99
# Sequences -> tokens of each answer: they take about a second on two cores, alone as well as with 128. Shorter
# windows tell more of what else the machine did than of pimoe.
_SECOND: Mapping[int, int] = {1: 264, 8: 112, 32: 60, 128: 26}


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        answers: how many sequences decode at once -> tokens of each, from a prompt of `prompt_tokens`.
        processes: group processes of each way.
        learning_tokens: of the answers from which the engine learns, before it is measured, whether two
            micro-batches pay.
        split_tokens: of the answers in which every part is timed.
    """

    rounds: int = 5
    answers: Mapping[int, int] = field(default_factory=lambda: _SECOND)
    processes: tuple[int, ...] = (2, 4)
    prompt_tokens: int = 8
    learning_tokens: int = 40
    split_tokens: int = 24
    shape: Shape = field(default_factory=Shape)

    @property
    def limits(self) -> RouterLimits:
        """Of an engine for the most sequences, with twice the blocks that they fill."""
        most = max(count * self._blocks(tokens) for count, tokens in self.answers.items())
        engine = EngineLimits(max(self.answers), kv_blocks=2 * most, reuse_prefixes=False)
        return RouterLimits(engine=engine)

    def _blocks(self, tokens: int) -> int:
        longest = self.prompt_tokens + max(tokens, self.learning_tokens, self.split_tokens)
        return -(-longest // BLOCK_TOKENS) + 1

    def prompts(self, sequences: int, seed: int) -> list[Prompt]:
        """The same for the same seed."""
        return random_prompts(self.shape.vocab_size, sequences, self.prompt_tokens, seed)


_TINY = Shape(64, 2, num_experts=4, top_k=2, expert_size=64, num_heads=2, num_kv_heads=1, vocab_size=256)
PRESETS = {
    "tiny": Preset(1, {1: 8, 4: 8}, (2, 4), learning_tokens=8, split_tokens=8, shape=_TINY),
    "default": Preset(),
}


@dataclass(frozen=True)
class Contender:
    """A way with the router behind it. `processes`: 0 in-process."""

    way: Way
    router: Router
    processes: int

    def micro_batches(self) -> MicroBatchStatistics:
        """Since it was started; threads of a way share a router."""
        assert self.router.engine is not None
        return self.router.engine.statistics().micro_batches


async def _start(stack: AsyncExitStack, folder: Path, preset: Preset, weights: str) -> list[Contender]:
    async def start(processes: int) -> Router:
        isolation = "processes" if processes else "in-process"
        runtime = await LocalRuntime.start(
            folder, processes or 1, isolation, limits=preset.limits, **quantization(weights)
        )
        return (await stack.enter_async_context(runtime)).router

    def contender(name: str, router: Router, threads: int, processes: int) -> Contender:
        # As `LocalRuntime` has it: a router whose groups are elsewhere computes with all cores.
        kernel_threads = cores() if processes else None
        return Contender(Way(name, threads, streaming(by_router(router)), kernel_threads), router, processes)

    local = await start(0)
    found = [
        contender(f"in-process, {threads} thread{'s' if threads > 1 else ''}", local, threads, 0)
        for threads in sorted({1, cores()})
    ]
    for processes in preset.processes:
        found.append(contender(f"{processes} group processes", await start(processes), 1, processes))
    return found


# The measurement -----------------------------------------------------------------------------------------------


async def _speeds(weights: str, preset: Preset, sequences: int, contenders: Sequence[Contender]) -> list[Speed]:
    steps = {contender.way.name: [0, 0] for contender in contenders}
    max_tokens = preset.answers[sequences]

    def measured(contender: Contender) -> Callable[[int], Awaitable[float]]:
        async def measure(index: int) -> float:
            before = contender.micro_batches()
            answers = await contender.way.ask(preset.prompts(sequences, index), max_tokens)
            after, counts = contender.micro_batches(), steps[contender.way.name]
            counts[0] += after.single - before.single
            counts[1] += after.double - before.double
            return decode_rate(answers)

        return measure

    for contender in contenders:
        prompts = preset.prompts(sequences, _WARM_UP_ROUND)
        await contender.way.ask(prompts, preset.learning_tokens)
    found = await take_turns(preset.rounds, {one.way.name: measured(one) for one in contenders})
    progress("; ".join(f"{name} {statistics.median(values):,.0f}" for name, values in found.items()))
    local = [found[one.way.name] for one in contenders if not one.processes]
    best = [max(values) for values in zip(*local, strict=True)]
    return [_speed(weights, sequences, one, found[one.way.name], best, steps[one.way.name]) for one in contenders]


def _speed(
    weights: str,
    sequences: int,
    contender: Contender,
    values: Sequence[float],
    best: Sequence[float],
    steps: Sequence[int],
) -> Speed:
    """`values` and `best`: tokens/s of each round, the latter of the fastest in-process way."""
    ratios = [value / other for value, other in zip(values, best, strict=True)]
    return Speed(
        *(weights, sequences, contender.way.name, contender.processes),
        *(statistics.median(values), statistics.median(ratios), min(ratios), max(ratios)),
        *steps,
    )


async def _parts(weights: str, preset: Preset, sequences: int, contender: Contender) -> Parts:
    with split(contender.router) as steps:
        await contender.way.ask(preset.prompts(sequences, _WARM_UP_ROUND + 1), preset.split_tokens)
    decoding = [step for step in steps if step.tokens == sequences]
    medians = {part: statistics.median(getattr(step, part) for step in decoding) for part in PARTS}
    layers = preset.shape.num_layers
    per_layer = {f"{part}_us": 1e6 * medians[part] / layers for part in PARTS if part != "other"}
    step_ms = 1e3 * statistics.median(sum(getattr(step, part) for part in PARTS) for step in decoding)
    return Parts(
        weights, sequences, contender.way.name, **per_layer, other_ms=1e3 * medians["other"], step_ms=step_ms
    )


async def _measure(preset: Preset, folder: Path, weights: str, results: Results) -> None:
    async with AsyncExitStack() as stack:
        progress(f"{weights}: starting")
        contenders = await _start(stack, folder, preset, weights)
        for sequences in preset.answers:
            progress(f"{weights}: {sequences} sequences")
            results.speeds += await _speeds(weights, preset, sequences, contenders)
            for contender in contenders:
                results.parts.append(await _parts(weights, preset, sequences, contender))


def measure(preset: Preset, weights: Sequence[str]) -> Results:
    """One kind of weights after the other."""
    results = Results(skipped=unknown_weights(weights))
    with (
        tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        folder = write_random_model(Path(made), preset.shape)
        for kind in weights:
            if f"pimoe {kind}" not in results.skipped:
                runner.run(_measure(preset, folder, kind, results))
    return results


# The command line ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here = PRESETS[options.preset], machine_and_kernels()
    if options.rounds is not None:
        preset = replace(preset, rounds=options.rounds)
    results = measure(preset, options.weights or WEIGHTS)
    lines = summary(results)
    judged = targets(results.speeds)
    facts = {"machine": here, "preset": options.preset, **asdict(results), "targets": judged, "summary": lines}
    parts = (machine_lines(here), tables(results), target_table(judged), "\n".join(lines))
    publish(facts, "\n\n".join(parts), options.json)
    if options.svg is not None:
        Path(options.svg).write_text(chart(results.speeds))


def main() -> int:
    """The command line. The groups' processes end with this one."""
    command_line = parser("Measure what it costs that experts live in other processes.", PRESETS)
    command_line.add_argument("--weights", action="append", choices=WEIGHTS, help="only these (both)")
    command_line.add_argument("--rounds", type=int, help="of each comparison (the preset's)")
    command_line.add_argument("--svg", metavar="FILE", help="draw tokens/s over sequences there")
    try:
        run(command_line.parse_args())
    except KeyboardInterrupt:
        return 130
    except PimoeError as error:
        print(f"error [{error.code}] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
