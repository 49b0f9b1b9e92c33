"""What load tests generate with: models, and ways to generate behind one interface.

A *generate* streams one sequence; a *burst* asks for many at once and says when each token came. All of them
generate greedily, past the end of the text and past the result cache, and prompts are token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import itertools
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pimoe.clients import AsyncClient
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.native import kernels
from pimoe.runtime.requests import GenerateRequest, SamplingParams
from pimoe.runtime.router.router import Router
from random_model import write_random_model
from report import machine, machine_line, progress
from switch_engines import Answer, Prompt

GROUPS = 2
EMBEDDED, WIDE = "embedded", "wide"
_MODELS = {"tiny": (EMBEDDED,), "default": (EMBEDDED, WIDE)}
BFLOAT16, INT8 = "bfloat16", "int8"
WEIGHTS = (BFLOAT16, INT8)
_QUANTIZATION = "expert_quantization"  # in the application's settings, and of LocalRuntime.start
_TIMEOUT_S = 600.0

Generate = Callable[[Prompt, int], AsyncGenerator[Sequence[int], None]]
"""Prompt, tokens wanted -> the tokens, in pieces as they come."""

Burst = Callable[[Sequence[Prompt], int], Awaitable[list[Answer]]]
"""Prompts, tokens wanted of each -> the answers, in the prompts' order."""


@dataclass(frozen=True)
class Way:
    """One way to generate. `threads`: torch's in this process while it is measured, and those of native kernels,
    unless `kernel_threads` says how many they may use."""

    name: str
    threads: int
    burst: Burst
    kernel_threads: int | None = None

    async def ask(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """All prompts at once.

        Raises:
            RuntimeError: a sequence brought another number of tokens than was asked for.
        """
        torch.set_num_threads(self.threads)
        kernels.use_threads(self.kernel_threads)
        answers = await self.burst(prompts, max_tokens)
        if short := [len(answer.tokens) for answer in answers if len(answer.tokens) != max_tokens]:
            raise RuntimeError(f"{self.name}: a sequence brought {short[0]} tokens instead of {max_tokens}")
        return answers


def over_http(client: AsyncClient) -> Generate:
    """By the application that `client` talks to, streaming."""

    async def generate(prompt: Prompt, max_tokens: int) -> AsyncGenerator[Sequence[int], None]:
        async with client.stream(
            prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, cache=False, timeout_s=_TIMEOUT_S
        ) as chunks:
            async for chunk in chunks:
                yield chunk.token_ids

    return generate


def by_router(router: Router) -> Generate:
    """By a router in this process."""
    ids = itertools.count()

    async def generate(prompt: Prompt, max_tokens: int) -> AsyncGenerator[Sequence[int], None]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(str(next(ids)), tuple(prompt), sampling, timeout_s=_TIMEOUT_S)
        async with aclosing(router.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk.token_ids

    return generate


def streaming(generate: Generate) -> Burst:
    """All sequences at the same time, each in a stream of its own."""

    async def burst(prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        return await asyncio.gather(*(_read(generate, prompt, max_tokens) for prompt in prompts))

    return burst


async def _read(generate: Generate, prompt: Prompt, max_tokens: int) -> Answer:
    answer = Answer(time.monotonic())
    async with aclosing(generate(prompt, max_tokens)) as pieces:
        async for tokens in pieces:
            answer.tokens += tokens
            answer.at += [time.monotonic()] * len(tokens)
    return answer


def in_step(asked: float, at: Sequence[float], steps: Sequence[Sequence[int]]) -> list[Answer]:
    """Answers of a rival that advances all sequences together: `steps[i]` are the tokens that came at `at[i]`, one
    for each sequence."""
    return [Answer(asked, list(tokens), at=list(at)) for tokens in zip(*steps, strict=True)]


# The machine ---------------------------------------------------------------------------------------------------


def machine_and_kernels(more_packages: Iterable[str] = ()) -> dict[str, Any]:
    """As `report.machine`, and which kernels pimoe computes with here."""
    return {**machine(more_packages), "kernels": kernels.description()}


def machine_lines(machine: dict[str, Any]) -> str:
    """What `machine_and_kernels` says, in two lines."""
    return f"{machine_line(machine)}\nnative kernels: {machine['kernels']}"


# Weights -------------------------------------------------------------------------------------------------------


def quantization(weights: str) -> dict[str, Any]:
    """What makes an application, or a `LocalRuntime`, keep its experts so."""
    return {_QUANTIZATION: INT8} if weights == INT8 else {}


def unknown_weights(weights: Sequence[str]) -> dict[str, str]:
    """Those of `weights` that this pimoe does not have, and why."""
    known = _QUANTIZATION in inspect.signature(LocalRuntime.start).parameters
    return {} if known or INT8 not in weights else {f"pimoe {INT8}": f"there is no option {_QUANTIZATION!r}"}


# Models --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What to measure with. `folder` None: the embedded model."""

    name: str
    folder: Path | None


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
    names = options.model or _MODELS[options.preset]
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        yield [_model(name, Path(made)) for name in names]


def _model(name: str, made: Path) -> Model:
    if name == EMBEDDED:
        return Model(EMBEDDED, None)
    if name == WIDE:
        progress("writing the wide model")
        return Model(WIDE, write_random_model(made))
    return Model(Path(name).resolve().name, Path(name))
