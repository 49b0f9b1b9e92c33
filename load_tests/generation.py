"""Tokens per second of the served application, beside the same model without HTTP, without Ray, without isolation.

    python load_tests/generation.py [--preset tiny] [--model FOLDER | --wide] [--groups N] [--json FILE]

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
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
from stand import one_line_errors, served

GROUPS = 2
_TIMEOUT_S = 600.0
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all ways and numbers of sequences, so that all meet the same disturbances.
        sequences: how many generate at once.
    """

    rounds: int
    sequences: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int


PRESETS = {
    "tiny": Preset(rounds=1, sequences=(1, 4), prompt_tokens=8, max_tokens=8),
    "default": Preset(rounds=5, sequences=(1, 8, 32), prompt_tokens=16, max_tokens=64),
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


Generate = Callable[[list[int], int], AsyncGenerator[int, None]]
"""Prompt, tokens wanted -> how many tokens each piece of the answer brought."""


@dataclass(frozen=True)
class Way:
    """One way to generate. `threads` are torch's in this process, while it is measured."""

    name: str
    threads: int
    generate: Generate

    @property
    def in_process(self) -> bool:
        """Whether it sets the limit that the others are measured against."""
        return self.name.startswith("in-process")


# The ways ------------------------------------------------------------------------------------------------------


def _over_http(client: AsyncClient) -> Generate:
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


async def _open_ways(stack: AsyncExitStack, folder: Path, groups: int, url: str) -> list[Way]:
    async def local(name: str, threads: int, groups: int, isolation: Isolation) -> Way:
        runtime = await LocalRuntime.start(folder, groups, isolation)
        await stack.enter_async_context(runtime)
        return Way(f"{name}, {threads} thread{'s' * (threads > 1)}", threads, _local(runtime))

    # Small steps are fastest on one thread, large ones on all cores: the limit is whichever wins.
    counts = sorted({1, cores()})
    ways = [await local("in-process, 1 group", threads, 1, "in-process") for threads in counts]
    ways.append(await local(f"in-process, {groups} groups", 1, groups, "in-process"))
    ways.append(await local(f"{groups} group processes", 1, groups, "processes"))
    client = await stack.enter_async_context(AsyncClient(url))
    return [*ways, Way(f"served over HTTP, {groups} groups", 1, _over_http(client))]


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


async def _measure(preset: Preset, folder: Path, name: str, groups: int, url: str) -> list[Result]:
    spec = read_spec(Checkpoint(folder))
    if not isinstance(spec, DecoderSpec):
        raise SystemExit(f"{folder} is a layer model, which does not generate")
    prompts = _prompts(spec.vocab_size, max(preset.sequences), preset.prompt_tokens)
    rates: dict[tuple[int, str], list[float]] = {}
    firsts: dict[tuple[int, str], list[list[float]]] = {}
    async with AsyncExitStack() as stack:
        progress("generation: starting the local ways")
        ways = await _open_ways(stack, folder, groups, url)
        for index in range(preset.rounds):
            progress(f"generation: round {index + 1} of {preset.rounds}")
            for sequences, way in itertools.product(preset.sequences, ways):
                await _burst(way, prompts[:sequences], _WARM_UP_TOKENS)
                rate, first_s = await _burst(way, prompts[:sequences], preset.max_tokens)
                rates.setdefault((sequences, way.name), []).append(rate)
                firsts.setdefault((sequences, way.name), []).append(first_s)
    medians = {case: statistics.median(values) for case, values in rates.items()}
    limits = {s: max(medians[s, way.name] for way in ways if way.in_process) for s in preset.sequences}
    return [
        Result(name, way, s, median, 1e3 * median_quantile(firsts[s, way], 0.5), median / limits[s])
        for (s, way), median in medians.items()
    ]


def measure(preset: Preset, model: Path | None, name: str, groups: int, url: str) -> list[Result]:
    """Start the local ways beside the application that serves `model` (None: the embedded one) at `url`, and
    measure all of them."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_measure(preset, model or CHECKPOINT, name, groups, url))


def tables(results: list[Result], preset: Preset) -> str:
    """For people: one table per model."""
    header = ("sequences", "way", "tokens/s", "to in-process", "first token p50 ms")
    return "\n\n".join(
        table(
            f"Generation, {model}: {preset.max_tokens} tokens after {preset.prompt_tokens} (medians of rounds)",
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
    """`--model`, `--wide` and `--groups`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint; the embedded model otherwise")
    which.add_argument(
        "--wide", action="store_true", help="a random model of hidden 512, 8 layers, 32 experts top-4, bfloat16"
    )
    parser.add_argument("--groups", type=int, default=GROUPS, help="expert groups (%(default)s)")


@contextmanager
def chosen_model(options: argparse.Namespace) -> Iterator[tuple[Path | None, str]]:
    """The folder (None: the embedded model) and a name for tables."""
    if not options.wide:
        yield options.model, "embedded model" if options.model is None else options.model.resolve().name
        return
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as folder:
        progress("writing the wide model")
        yield write_random_model(Path(folder)), "wide model"


def main() -> None:
    """The command line."""
    options_parser = parser(
        "Compare generation by the served application with the same model in-process.", PRESETS
    )
    add_model_options(options_parser)
    options = options_parser.parse_args()
    preset, here = PRESETS[options.preset], machine()
    with one_line_errors(), chosen_model(options) as (model, name), served(model, options.groups) as cluster:
        results = measure(preset, model, name, options.groups, cluster.url)
    facts: dict[str, Any] = {"machine": here, "preset": options.preset, "generation": [asdict(r) for r in results]}
    publish(facts, f"{machine_line(here)}\n\n{tables(results, preset)}", options.json)


if __name__ == "__main__":
    main()
