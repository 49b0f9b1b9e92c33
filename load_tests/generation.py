"""Tokens per second of the served application, beside the same model without HTTP, without Ray, without isolation.

    python load_tests/generation.py [--preset tiny] [--model FOLDER|embedded|wide] [--groups N] [--json FILE]

All ways are up at the same time and take turns. Prompts are token ids; every sequence generates the same number of
tokens, greedily, past the end of its text, and past the result cache. See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pimoe.clients import AsyncClient
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.local import Isolation, LocalRuntime
from pimoe.runtime.loop_thread import new_event_loop
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.spec import DecoderSpec
from pimoe.runtime.requests import GenerateRequest, SamplingParams
from random_model import write_random_model
from report import cores, machine, machine_line, median_quantile, parser, progress, publish, table
from stand import stand, supervised

GROUPS = 2
_TIMEOUT_S = 600.0
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all ways and numbers of sequences, so that all meet the same disturbances.
        sequences: how many generate at once.
        models: unless the command line names some.
        all_cores: also in-process with a torch thread per core, which wins where steps are large.
    """

    rounds: int
    sequences: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    models: tuple[str, ...]
    all_cores: bool = True


EMBEDDED, WIDE = "embedded", "wide"
PRESETS = {
    "tiny": Preset(1, sequences=(1, 4), prompt_tokens=8, max_tokens=8, models=(EMBEDDED,), all_cores=False),
    "default": Preset(3, sequences=(1, 8, 32), prompt_tokens=16, max_tokens=64, models=(EMBEDDED, WIDE)),
}


@dataclass(frozen=True)
class Result:
    """Medians over rounds.

    Attributes:
        tokens_per_s: generated tokens of all sequences, from the first request to the last token.
        first_token_p50_ms: from a sequence's request to its first token; all requests are sent at once.
        ratio: of `tokens_per_s` to the fastest in-process way with as many sequences.
    """

    model: str
    way: str
    sequences: int
    tokens_per_s: float
    first_token_p50_ms: float
    ratio: float


@dataclass(frozen=True)
class Model:
    """What to measure with. `folder` None: the embedded model."""

    name: str
    folder: Path | None


Generate = Callable[[list[int], int], AsyncGenerator[int, None]]
"""Prompt, tokens wanted -> how many tokens each piece of the answer brought."""


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        threads: torch's in this process, while it is measured.
        in_process: whether it is one of the limits that the others are measured against.
    """

    name: str
    threads: int
    generate: Generate
    in_process: bool = False


# The ways ------------------------------------------------------------------------------------------------------


def over_http(client: AsyncClient) -> Generate:
    async def generate(prompt: list[int], max_tokens: int) -> AsyncGenerator[int, None]:
        async with client.stream(
            prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, cache=False, timeout_s=_TIMEOUT_S
        ) as chunks:
            async for chunk in chunks:
                yield len(chunk.token_ids)

    return generate


def _local(runtime: LocalRuntime) -> Generate:
    ids = itertools.count()

    async def generate(prompt: list[int], max_tokens: int) -> AsyncGenerator[int, None]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(str(next(ids)), tuple(prompt), sampling, timeout_s=_TIMEOUT_S)
        async with aclosing(runtime.router.generate(request)) as chunks:
            async for chunk in chunks:
                yield len(chunk.token_ids)

    return generate


async def _open_ways(stack: AsyncExitStack, folder: Path, threads: set[int], groups: int, url: str) -> list[Way]:
    async def local(name: str, count: int, groups: int, isolation: Isolation) -> Way:
        runtime = await LocalRuntime.start(folder, groups, isolation)
        await stack.enter_async_context(runtime)
        plural = "s" if count > 1 else ""
        return Way(f"{name}, {count} thread{plural}", count, _local(runtime), isolation == "in-process")

    ways = [await local("in-process, 1 group", count, 1, "in-process") for count in sorted(threads)]
    ways.append(await local(f"in-process, {groups} groups", 1, groups, "in-process"))
    ways.append(await local(f"{groups} group processes", 1, groups, "processes"))
    client = await stack.enter_async_context(AsyncClient(url))
    return [*ways, Way(f"served over HTTP, {groups} groups", 1, over_http(client))]


# The measurement -----------------------------------------------------------------------------------------------


async def _one(generate: Generate, prompt: list[int], max_tokens: int) -> float:
    """Seconds to the first token of a whole sequence."""
    started, first_s, tokens = time.perf_counter(), 0.0, 0
    async with aclosing(generate(prompt, max_tokens)) as pieces:
        async for count in pieces:
            if count and not tokens:
                first_s = time.perf_counter() - started
            tokens += count
    if tokens != max_tokens:
        raise RuntimeError(f"a sequence brought {tokens} tokens instead of {max_tokens}")
    return first_s


async def _burst(way: Way, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[float]]:
    """Tokens per second, and each sequence's seconds to its first token."""
    torch.set_num_threads(way.threads)
    started = time.perf_counter()
    first_s = await asyncio.gather(*(_one(way.generate, prompt, max_tokens) for prompt in prompts))
    return len(prompts) * max_tokens / (time.perf_counter() - started), first_s


def _prompts(vocab_size: int, count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(vocab_size, (count, tokens), generator=generator).tolist()
    return prompts


async def _measure(preset: Preset, model: Model, groups: int, url: str) -> list[Result]:
    folder = model.folder or CHECKPOINT
    spec = read_spec(Checkpoint(folder))
    if not isinstance(spec, DecoderSpec):
        raise SystemExit(f"{folder} is a layer model, which does not generate")
    prompts = _prompts(spec.vocab_size, max(preset.sequences), preset.prompt_tokens)
    rates: dict[tuple[int, str], list[float]] = {}
    firsts: dict[tuple[int, str], list[list[float]]] = {}
    async with AsyncExitStack() as stack:
        progress("generation: starting the local ways")
        # Small steps are fastest on one thread, large ones on all cores: the limit is whichever wins.
        threads = {1, cores()} if preset.all_cores else {1}
        ways = await _open_ways(stack, folder, threads, groups, url)
        for index in range(preset.rounds):
            progress(f"generation, {model.name}: round {index + 1} of {preset.rounds}")
            for sequences, way in itertools.product(preset.sequences, ways):
                await _burst(way, prompts[:sequences], _WARM_UP_TOKENS)
                rate, first_s = await _burst(way, prompts[:sequences], preset.max_tokens)
                rates.setdefault((sequences, way.name), []).append(rate)
                firsts.setdefault((sequences, way.name), []).append(first_s)
    medians = {case: statistics.median(values) for case, values in rates.items()}
    limits = {s: max(medians[s, way.name] for way in ways if way.in_process) for s in preset.sequences}
    return [
        Result(model.name, way, s, median, 1e3 * median_quantile(firsts[s, way], 0.5), median / limits[s])
        for (s, way), median in medians.items()
    ]


def measure(preset: Preset, model: Model, groups: int, url: str) -> list[Result]:
    """Start the local ways beside the application that serves `model` at `url`, and measure all of them."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_measure(preset, model, groups, url))


def tables(results: list[Result], preset: Preset) -> str:
    """For people: one table per model."""
    header = ("sequences", "way", "tokens/s", "to in-process", "first token p50 ms")
    return "\n\n".join(
        table(
            f"Generation, {model} model: {preset.max_tokens} tokens each, prompts of {preset.prompt_tokens}",
            header,
            [
                (
                    str(r.sequences),
                    r.way,
                    f"{r.tokens_per_s:,.0f}",
                    f"{r.ratio:.2f}x",
                    f"{r.first_token_p50_ms:.1f}",
                )
                for r in results
                if r.model == model
            ],
        )
        for model in dict.fromkeys(result.model for result in results)
    )


# The command line ----------------------------------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--groups`."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="FOLDER",
        help=f"a checkpoint, {EMBEDDED!r}, or {WIDE!r}: random, hidden 512, 8 layers, 32 experts top-4, bfloat16; "
        "may be repeated (the preset's)",
    )
    parser.add_argument("--groups", type=int, default=GROUPS, help="expert groups (%(default)s)")


@contextmanager
def chosen_models(options: argparse.Namespace) -> Iterator[list[Model]]:
    """The models of the command line, or the preset's."""
    names = options.model or PRESETS[options.preset].models
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        yield [_model(name, Path(made)) for name in names]


def _model(name: str, made: Path) -> Model:
    if name == EMBEDDED:
        return Model(EMBEDDED, None)
    if name == WIDE:
        progress("writing the wide model")
        return Model(WIDE, write_random_model(made))
    return Model(Path(name).resolve().name, Path(name))


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here = PRESETS[options.preset], machine()
    results: list[Result] = []
    with chosen_models(options) as models, stand() as cluster:
        for model in models:
            cluster.serve(model.folder, options.groups)
            results += measure(preset, model, options.groups, cluster.url)
    facts: dict[str, Any] = {"machine": here, "preset": options.preset, "generation": [asdict(r) for r in results]}
    publish(facts, f"{machine_line(here)}\n\n{tables(results, preset)}", options.json)


if __name__ == "__main__":
    command_line = parser("Compare generation by the served application with the same model in-process.", PRESETS)
    add_model_options(command_line)
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
