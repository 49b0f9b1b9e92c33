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
from collections.abc import Mapping, Sequence
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
    machine_and_kernels,
    machine_lines,
    over_http,
    quantization,
    streaming,
    unknown_weights,
)
from generation_cases import Case, agreement_of, rate_of, rounds_of
from generation_results import (
    DECODE,
    LLAMA,
    PREFILL,
    QUIET,
    SERVED,
    TRANSFORMERS,
    Agreement,
    Rate,
    Rival,
    chart,
    rival_of,
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
from report import cores, parser, progress, publish, target_table
from rounds import take_turns
from stand import Stand, stand, supervised
from switch_engines import Answer

_GGUF = {BFLOAT16: "BF16", INT8: "Q8_0"}
_WARM_UP_TOKENS, _TRIAL_TOKENS = 4, 10
_TRIAL_SEED = 9999  # no round has it
# Sequences -> tokens of each answer: pimoe takes about a second on two cores, transformers longer. Shorter windows
# tell more of what else the machine did than of who generates.
_SECOND: Mapping[int, int] = {1: 224, 8: 96, 32: 52}
# Sequences -> how often as many prompts follow one another in a round, for the same reason.
_PREFILLS: Mapping[int, int] = {1: 8, 8: 2}


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all ways, so that all meet the same disturbances.
        answers: how many sequences generate at once -> tokens of each, from a prompt of `prompt_tokens`.
        prefill_tokens: of a prompt, from which one token is generated.
        prefills: how many prefill at once -> how often in a round; 1 where it does not say.
    """

    rounds: int = 3
    answers: Mapping[int, int] = field(default_factory=lambda: _SECOND)
    prompt_tokens: int = 16
    prefill_tokens: int = 128
    prefills: Mapping[int, int] = field(default_factory=lambda: _PREFILLS)
    shape: Shape = field(default_factory=Shape)

    @property
    def context_tokens(self) -> int:
        """The longest sequence."""
        return max(self.prompt_tokens + max(self.answers.values()), self.prefill_tokens + 1)


_TINY = Shape(64, 2, num_experts=4, top_k=2, expert_size=64, num_heads=2, num_kv_heads=1, vocab_size=256)
PRESETS = {
    "tiny": Preset(2, {1: 8, 4: 8}, prompt_tokens=8, prefill_tokens=32, prefills={1: 2}, shape=_TINY),
    "default": Preset(),
}


@dataclass
class Results:
    """All that was found.

    Attributes:
        choices: how transformers computed.
        rivals: llama.cpp, once for each kind of weights.
        skipped: which way could not take part, why.
    """

    rates: list[Rate] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    rivals: list[Rival] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


# The ways ------------------------------------------------------------------------------------------------------


async def _in_process(stack: AsyncExitStack, folder: Path, preset: Preset, weights: str) -> list[Way]:
    """With one torch thread, which is fastest where steps are small, and with one per core."""
    # Both share a runtime: what one has computed, the other may not know.
    engine = EngineLimits(max(preset.answers), reuse_prefixes=False)
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
        opened = llama(folder, _GGUF[weights], max(preset.answers), preset.context_tokens)
        process = stack.enter_context(opened)
        ways.append(Way(f"{LLAMA} {_GGUF[weights]}", 1, process.burst))
        results.rivals.append(rival_of(process.about, _GGUF[weights]))
    except RivalMissingError as missing:
        results.skipped[f"{LLAMA} {_GGUF[weights]}"] = str(missing)
    return ways


# The measurement -----------------------------------------------------------------------------------------------


def _cases(preset: Preset) -> list[Case]:
    vocab = preset.shape.vocab_size
    decode = [Case(DECODE, count, preset.prompt_tokens, tokens, vocab) for count, tokens in preset.answers.items()]
    return decode + [
        Case(PREFILL, count, preset.prefill_tokens, 1, vocab, preset.prefills.get(count, 1))
        for count in preset.answers
    ]


Quiet = dict[Case, list[float]]
"""Tokens/s of transformers in each round before the cluster starts."""


async def _quiet(rival: Transformers, cases: Sequence[Case], rounds: int, results: Results) -> Quiet:
    """Find how transformers is fastest, and how fast it is while nothing else runs."""
    way, found = Way(TRANSFORMERS, cores(), rival.burst), {}
    for case in cases:
        prompts = case.prompts(seed=_TRIAL_SEED)
        await rival.choose(prompts, min(case.max_tokens, _TRIAL_TOKENS), case.rate(prompts))
        choice = rival.choices[case.sequences, case.prompt_tokens]
        results.choices.append({"phase": case.phase, "sequences": case.sequences, **asdict(choice)})
        measure = rounds_of(case, way, [])
        found[case] = [await measure(index) for index in range(rounds)]
        median = statistics.median(found[case])
        progress(f"transformers alone: {case.phase}, {case.sequences} sequences: {choice}: {median:,.0f}")
    return found


async def _measure_case(
    weights: str, case: Case, ways: Sequence[Way], quiet: Sequence[float], results: Results
) -> None:
    """As many rounds as there were quiet ones."""
    answers: dict[str, list[list[Answer]]] = {way.name: [] for way in ways}
    for way in ways:
        await way.ask(case.prompts(seed=_TRIAL_SEED - 1), min(case.max_tokens, _WARM_UP_TOKENS))
    measured = {way.name: rounds_of(case, way, answers[way.name]) for way in ways}
    rates = {**await take_turns(len(quiet), measured), QUIET: list(quiet)}
    progress("; ".join(f"{name} {statistics.median(values):,.0f}" for name, values in rates.items()))
    results.rates += [rate_of(weights, case, name, rates) for name in rates]
    if case.phase == DECODE:
        rivals = (TRANSFORMERS, QUIET)
        results.agreements += [agreement_of(weights, case, name, answers) for name in rates if name not in rivals]


async def _measure(
    preset: Preset, cluster: Stand, folder: Path, weights: str, rival: Transformers, quiet: Quiet, results: Results
) -> None:
    async with AsyncExitStack() as stack:
        progress(f"{weights}: starting the other ways")
        ways = await _ways(stack, cluster, folder, preset, weights, rival, results)
        for case, alone in quiet.items():
            progress(f"{weights}: {case.phase}, {case.sequences} sequences")
            await _measure_case(weights, case, ways, alone, results)


def measure(preset: Preset, cluster: Stand, groups: int, weights: Sequence[str]) -> Results:
    """One kind of weights after the other; transformers takes part in both, in bfloat16."""
    results = Results(skipped=unknown_weights(weights))
    known = [kind for kind in weights if f"pimoe {kind}" not in results.skipped]
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        folder = write_random_model(Path(made), preset.shape)
        rival = Transformers(folder, preset.shape.dtype)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            progress("transformers alone: finding its fastest experts implementation")
            quiet = runner.run(_quiet(rival, _cases(preset), preset.rounds, results))
            for kind in known:
                cluster.serve(folder, groups, quantization(kind))
                runner.run(_measure(preset, cluster, folder, kind, rival, quiet, results))
    return results


# The command line ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here = PRESETS[options.preset], machine_and_kernels(("transformers",))
    if options.rounds is not None:
        preset = replace(preset, rounds=options.rounds)
    with stand() as cluster:
        results = measure(preset, cluster, options.groups, options.weights or WEIGHTS)
    lines = summary(results.rates, results.agreements, results.choices, results.rivals, results.skipped)
    judged = targets(results.rates, results.agreements)
    facts = {"machine": here, "preset": options.preset, **asdict(results), "targets": judged, "summary": lines}
    answers = "/".join(map(str, dict.fromkeys(preset.answers.values())))
    titles = {
        DECODE: f"decoding, {answers} tokens from prompts of {preset.prompt_tokens}",
        PREFILL: f"prefilling, prompts of {preset.prefill_tokens}",
    }
    shown = tables(results.rates, results.agreements, titles)
    parts = (machine_lines(here), shown, target_table(judged), "\n".join(lines))
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
