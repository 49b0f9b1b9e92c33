"""What the engine's switches cost and gain: batch invariance, micro-batches, prefix reuse, the prefill budget.

    python load_tests/engine_switches.py [--preset tiny] [--model NAME] [--switch NAME] [--rounds N] [--json FILE]

The model's trunk in this process, its experts in two others, over links; no Ray, no HTTP. Engines that differ in
one switch share all of that and take turns. See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.errors import PimoeError
from pimoe.runtime.loop_thread import new_event_loop
from random_model import write_random_model
from report import machine, machine_line, parser, progress, publish
from switch_engines import start_runtime
from switch_prompts import budgets, reuse_prefixes
from switch_results import OFF, ON, Results, summary, tables
from switch_steps import Loaded, Preset, batch_invariance, micro_batches, proofs

EMBEDDED, WIDE_FLOAT32, WIDE_BFLOAT16 = "embedded", "wide-float32", "wide-bfloat16"
MODELS = (EMBEDDED, WIDE_FLOAT32, WIDE_BFLOAT16)
INVARIANT, MICRO_BATCHES, REUSE, BUDGET = "batch_invariant", "micro_batches", "reuse_prefixes", "max_step_tokens"
SWITCHES = (INVARIANT, MICRO_BATCHES, REUSE, BUDGET)

PRESETS = {
    "tiny": Preset(
        rounds=2,
        sequences=(1, 4),
        max_tokens=10,
        prefill=(2, 32),
        proof=(6, 4),
        slow_sequences=(4,),
        learning_tokens=40,
        shared=(4, 64, 16),
        budgets=(32, 128),
        decoding=2,
        beside=(2, 128),
    ),
    "default": Preset(),
}
_TINY_MODELS = (EMBEDDED,)


async def _measure(model: Loaded, preset: Preset, switches: Sequence[str], results: Results) -> None:
    if INVARIANT in switches:
        results.invariance += await batch_invariance(model, preset)
        results.proofs += await proofs(model, preset)
    if MICRO_BATCHES in switches:
        rates, decided = await micro_batches(model, preset)
        results.micro_batches += rates
        results.decided += decided
    if REUSE in switches:
        results.reuse += await reuse_prefixes(model, preset)
    if BUDGET in switches:
        results.budgets += await budgets(model, preset)


async def measure(preset: Preset, models: Sequence[str], switches: Sequence[str]) -> Results:
    """One model after the other."""
    torch.set_num_threads(1)  # as a router's process, beside the two of the groups
    results = Results([], [], [], [], [], [])
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        wide = None
        for name in models:
            if name != EMBEDDED and wide is None:
                progress("writing the wide model")
                wide = write_random_model(Path(made))
            dtype = "bfloat16" if name == WIDE_BFLOAT16 else "float32"
            folder = CHECKPOINT if name == EMBEDDED or wide is None else wide
            async with AsyncExitStack() as stack:
                progress(f"{name}: starting")
                runtimes = {
                    way: await stack.enter_async_context(await start_runtime(folder, dtype, way == ON))
                    for way in ((OFF, ON) if INVARIANT in switches else (OFF,))
                }
                await _measure(Loaded(name, runtimes), preset, switches, results)
    return results


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here = PRESETS[options.preset], machine()
    if options.rounds is not None:
        preset = replace(preset, rounds=options.rounds)
    models = options.model or (_TINY_MODELS if options.preset == "tiny" else MODELS)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        results = runner.run(measure(preset, models, options.switch or SWITCHES))
    facts = {"machine": here, "preset": options.preset, **asdict(results), "summary": summary(results)}
    publish(facts, f"{machine_line(here)}\n\n{tables(results)}", options.json)


def main() -> int:
    """The command line. What was started has ended when it returns: the groups' processes end with this one."""
    command_line = parser("Measure what the engine's switches cost and gain.", PRESETS)
    command_line.add_argument("--model", action="append", choices=MODELS, help="only these (the preset's)")
    command_line.add_argument("--switch", action="append", choices=SWITCHES, help="only these (all)")
    command_line.add_argument("--rounds", type=int, help="of each comparison (the preset's)")
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
