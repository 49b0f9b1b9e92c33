"""Generation beside what users would pick instead: pimoe served and in-process, transformers, llama.cpp.

    python load_tests/compare_generation.py [--preset tiny] [--weights NAME] [--rounds N] [--json F] [--svg F]

One Qwen3-MoE checkpoint, made with a fixed seed. Decoding and prefilling are measured apart, for the same prompts,
greedily; all ways of one table are up at the same time and take turns. See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from generation import (
    BFLOAT16,
    GROUPS,
    INT8,
    WEIGHTS,
    Way,
    by_router,
    over_http,
    quantization,
    streaming,
    unknown_weights,
)
from generation_results import (
    DECODE,
    LLAMA,
    PREFILL,
    SERVED,
    TRANSFORMERS,
    Agreement,
    Rate,
    chart,
    summary,
    tables,
    targets,
)
from generation_rivals import RivalMissingError, Transformers, llama
from pimoe.clients import AsyncClient
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.loop_thread import new_event_loop
from pimoe.runtime.router.limits import RouterLimits
from random_model import Shape, write_random_model
from report import cores, machine, machine_line, parser, progress, publish, target_table
from stand import Stand, stand, supervised
from switch_engines import Answer, Prompt, decode_rate, prefill_rate, random_prompts
from switch_measurements import median_ratio, take_turns

_GGUF = {BFLOAT16: "BF16", INT8: "Q8_0"}
_WARM_UP_TOKENS, _TRIAL_TOKENS = 4, 10


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all ways, so that all meet the same disturbances.
        sequences: how many generate at once.
        decode: tokens of a prompt, and of its answer.
        prefill_tokens: of a prompt, from which one token is generated.
    """

    rounds: int = 3
    sequences: tuple[int, ...] = (1, 8, 32)
    decode: tuple[int, int] = (16, 24)
    prefill_tokens: int = 128
    shape: Shape = field(default_factory=Shape)

    @property
    def context_tokens(self) -> int:
        """The longest sequence."""
        return max(sum(self.decode), self.prefill_tokens + 1)


_TINY = Shape(64, 2, num_experts=4, top_k=2, expert_size=64, num_heads=2, num_kv_heads=1, vocab_size=256)
PRESETS = {
    "tiny": Preset(2, sequences=(1, 4), decode=(8, 8), prefill_tokens=32, shape=_TINY),
    "default": Preset(),
}


@dataclass
class Results:
    """All that was found. `choices`: how transformers computed; `skipped`: which way could not take part, why."""

    rates: list[Rate] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


# The ways ------------------------------------------------------------------------------------------------------


async def _in_process(stack: AsyncExitStack, folder: Path, preset: Preset, weights: str) -> list[Way]:
    """With one torch thread, which is fastest where steps are small, and with one per core."""
    # Both share a runtime: what one has computed, the other may not know.
    engine = EngineLimits(max(preset.sequences), reuse_prefixes=False)
    limits = RouterLimits(engine=engine)
    runtime = await LocalRuntime.start(folder, limits=limits, **quantization(weights))
    await stack.enter_async_context(runtime)
    burst = streaming(by_router(runtime.router))
    counts = sorted({1, cores()})
    return [Way(f"in-process, {count} thread{'s' if count > 1 else ''}", count, burst) for count in counts]


async def _ways(
    stack: AsyncExitStack,
    cluster: Stand,
    folder: Path,
    preset: Preset,
    weights: str,
    rival: Transformers,
    results: Results,
) -> list[Way]:
    client = await stack.enter_async_context(AsyncClient(cluster.url))
    ways = [Way(SERVED, 1, streaming(over_http(client))), *await _in_process(stack, folder, preset, weights)]
    ways.append(Way(TRANSFORMERS, cores(), rival.burst))
    try:
        opened = llama(folder, _GGUF[weights], max(preset.sequences), preset.context_tokens)
        ways.append(Way(f"{LLAMA} {_GGUF[weights]}", 1, stack.enter_context(opened).burst))
    except RivalMissingError as missing:
        results.skipped[f"{LLAMA} {_GGUF[weights]}"] = str(missing)
    return ways


# The measurement -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is asked at once, and how its rate is read."""

    phase: str
    sequences: int
    prompt_tokens: int
    max_tokens: int
    vocab_size: int

    def prompts(self, seed: int) -> list[Prompt]:
        """Other ones in each round, or a router knows their beginnings."""
        return random_prompts(self.vocab_size, self.sequences, self.prompt_tokens, seed)

    def rate(self, prompts: Sequence[Prompt]) -> Callable[[list[Answer]], float]:
        """Tokens/s of answers to `prompts`."""
        return decode_rate if self.phase == DECODE else lambda answers: prefill_rate(prompts, answers)


def _cases(preset: Preset) -> list[Case]:
    vocab = preset.shape.vocab_size
    decode = [Case(DECODE, count, *preset.decode, vocab) for count in preset.sequences]
    return decode + [Case(PREFILL, count, preset.prefill_tokens, 1, vocab) for count in preset.sequences]


async def _choose(rival: Transformers, cases: Sequence[Case], results: Results) -> None:
    for case in cases:
        prompts = case.prompts(seed=99)
        await rival.choose(prompts, min(case.max_tokens, _TRIAL_TOKENS), case.rate(prompts))
        choice = rival.choices[case.sequences, case.prompt_tokens]
        results.choices.append({"phase": case.phase, "sequences": case.sequences, **asdict(choice)})


async def _measure_case(weights: str, case: Case, ways: Sequence[Way], rounds: int, results: Results) -> None:
    answers: dict[str, list[list[Answer]]] = {way.name: [] for way in ways}

    def measured(way: Way) -> Callable[[int], Any]:
        async def measure(index: int) -> float:
            prompts = case.prompts(seed=index)
            answers[way.name].append(found := await way.ask(prompts, case.max_tokens))
            return case.rate(prompts)(found)

        return measure

    for way in ways:
        await way.ask(case.prompts(seed=98), min(case.max_tokens, _WARM_UP_TOKENS))
    rates = await take_turns(rounds, {way.name: measured(way) for way in ways})
    progress("; ".join(f"{name} {statistics.median(values):,.0f}" for name, values in rates.items()))
    llama_rates = next((values for name, values in rates.items() if name.startswith(LLAMA)), None)
    results.rates += [
        Rate(
            weights,
            case.phase,
            case.sequences,
            name,
            statistics.median(values),
            median_ratio(values, rates[TRANSFORMERS]),
            None if llama_rates is None else median_ratio(values, llama_rates),
        )
        for name, values in rates.items()
    ]
    if case.phase == DECODE:
        results.agreements += [_agreement(weights, case, name, answers) for name in rates if name != TRANSFORMERS]


def _agreement(weights: str, case: Case, name: str, answers: dict[str, list[list[Answer]]]) -> Agreement:
    pairs = [
        (one.tokens, other.tokens)
        for ours, theirs in zip(answers[name], answers[TRANSFORMERS], strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    same = sum(common_tokens(one, other) for one, other in pairs)
    first = sum(one[0] == other[0] for one, other in pairs)
    return Agreement(weights, case.sequences, name, same, len(pairs) * case.max_tokens, first, len(pairs))


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


async def _measure(
    preset: Preset, cluster: Stand, folder: Path, weights: str, rival: Transformers, results: Results
) -> None:
    async with AsyncExitStack() as stack:
        progress(f"{weights}: starting the other ways")
        ways = await _ways(stack, cluster, folder, preset, weights, rival, results)
        for case in _cases(preset):
            progress(f"{weights}: {case.phase}, {case.sequences} sequences")
            await _measure_case(weights, case, ways, preset.rounds, results)


def measure(preset: Preset, cluster: Stand, groups: int, weights: Sequence[str]) -> Results:
    """One kind of weights after the other; transformers takes part in both, in bfloat16."""
    results = Results(skipped=unknown_weights(weights))
    known = [kind for kind in weights if f"pimoe {kind}" not in results.skipped]
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        folder = write_random_model(Path(made), preset.shape)
        rival = Transformers(folder, preset.shape.dtype)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            progress("transformers: finding its fastest experts implementation")
            runner.run(_choose(rival, _cases(preset), results))
            for kind in known:
                cluster.serve(folder, groups, quantization(kind))
                runner.run(_measure(preset, cluster, folder, kind, rival, results))
    return results


# The command line ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here = PRESETS[options.preset], machine(("transformers",))
    if options.rounds is not None:
        preset = replace(preset, rounds=options.rounds)
    with stand() as cluster:
        results = measure(preset, cluster, options.groups, options.weights or WEIGHTS)
    lines = summary(results.rates, results.agreements, results.choices, results.skipped)
    judged = targets(results.rates)
    facts = {"machine": here, "preset": options.preset, **asdict(results), "targets": judged, "summary": lines}
    titles = {
        DECODE: f"decoding, {preset.decode[1]} tokens from prompts of {preset.decode[0]}",
        PREFILL: f"prefilling, prompts of {preset.prefill_tokens}",
    }
    shown = tables(results.rates, results.agreements, titles)
    parts = (machine_line(here), shown, target_table(judged), "\n".join(lines))
    publish(facts, "\n\n".join(parts), options.json)
    if options.svg is not None:
        Path(options.svg).write_text(chart(results.rates))


if __name__ == "__main__":
    command_line = parser("Compare generation by pimoe, transformers and llama.cpp.", PRESETS)
    command_line.add_argument("--groups", type=int, default=GROUPS, help="expert groups (%(default)s)")
    command_line.add_argument("--weights", action="append", choices=WEIGHTS, help="only these (both)")
    command_line.add_argument("--rounds", type=int, help="of each comparison (the preset's)")
    command_line.add_argument("--svg", metavar="FILE", help="draw tokens/s over sequences there")
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
