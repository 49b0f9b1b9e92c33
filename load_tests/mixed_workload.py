"""Mixed prompts in a closed loop: the requests, the clients, and what came of them. See `mixed_prompts.py`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
from generation import Generate
from random_model import Shape
from report import quantile

SHORT, LONG = "short", "long"


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        requests: counted ones of each way; the `concurrency` before them and all after them only keep up the load.
        prompt_tokens: the shortest and the longest prompt.
        short_tokens, long_tokens: a prompt of at most, and of at least, so many is "short", "long".
        max_tokens: the shortest and the longest answer.
        step_tokens, rival_requests: of transformers' steps, and how many requests it is measured with.
    """

    requests: int = 320
    concurrency: int = 32
    prompt_tokens: tuple[int, int] = (16, 1500)
    short_tokens: int = 128
    long_tokens: int = 512
    max_tokens: tuple[int, int] = (16, 64)
    step_tokens: int = 512
    rival_requests: int = 64
    shape: Shape = field(
        default_factory=lambda: Shape(
            hidden_size=384,
            num_layers=6,
            num_experts=16,
            expert_size=192,
            num_heads=6,
            num_kv_heads=2,
            dtype="float32",
        )
    )

    @property
    def kv_tokens(self) -> int:
        """That all sequences may come to together."""
        return self.concurrency * (self.prompt_tokens[1] + self.max_tokens[1])


# The workload --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One request. `counted`: it is part of the result."""

    prompt: list[int]
    max_tokens: int
    counted: bool


def workload(preset: Preset, seed: int = 0, short_only: bool = False) -> Iterator[Asked]:
    """The same requests for the same seed, without an end; no prompt begins as another does."""
    generator = np.random.default_rng(seed)
    low, high = np.log(preset.prompt_tokens[0]), np.log(preset.prompt_tokens[1])
    answers = preset.max_tokens[0], preset.max_tokens[1] + 1
    first, last = preset.concurrency, preset.concurrency + preset.requests
    number = 0
    while True:
        tokens = round(float(np.exp(generator.uniform(low, high))))
        prompt = generator.integers(preset.shape.vocab_size, size=tokens).tolist()
        max_tokens = int(generator.integers(*answers))
        if short_only and tokens > preset.short_tokens:
            continue
        yield Asked(prompt, max_tokens, first <= number < last)
        number += 1


@dataclass
class Answered:
    """When the tokens of one answer came, in seconds of the monotonic clock."""

    asked: Asked
    started_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        """From the request on."""
        return self.token_s[0] - self.started_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_s)]


async def _ask(generate: Generate, asked: Asked) -> Answered:
    answered = Answered(asked, time.monotonic())
    async with aclosing(generate(asked.prompt, asked.max_tokens)) as pieces:
        async for tokens in pieces:
            answered.token_s += [time.monotonic()] * len(tokens)
    if len(answered.token_s) != asked.max_tokens:
        raise RuntimeError(f"a request brought {len(answered.token_s)} tokens instead of {asked.max_tokens}")
    return answered


async def closed_loop(generate: Generate, requests: Iterator[Asked], preset: Preset) -> list[Answered]:
    """As many clients as `concurrency`, until all counted requests are answered; gives whatever was answered."""
    answered: list[Answered] = []
    left = preset.requests

    async def client() -> None:
        nonlocal left
        while left:
            done = await _ask(generate, next(requests))
            answered.append(done)
            left -= done.asked.counted

    async with asyncio.TaskGroup() as clients:
        for _ in range(preset.concurrency):
            clients.create_task(client())
    return answered


# What came of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One length of prompts in one way.

    Attributes:
        ratio: p99 of the time to first token to its median.
        itl_p50_ms, itl_p99_ms: inter-token latency: of all gaps between tokens of one answer.
    """

    way: str
    prompts: str
    requests: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    ratio: float
    itl_p50_ms: float
    itl_p99_ms: float


@dataclass(frozen=True)
class Totals:
    """All prompts of one way.

    Attributes:
        requests_per_s, prompt_tokens_per_s, output_tokens_per_s: from the first counted request to the last one's
            end; whatever was answered meanwhile. A prompt counts when its first token comes.
        beside_long: part of the short prompts that waited for their first token while a long one did.
        engine: what the statistics of the router's engine rose by; empty for transformers.
        peaks: the most that some of them stood at.
    """

    way: str
    seconds: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    beside_long: float
    engine: dict[str, float]
    peaks: dict[str, float]


def _summary(way: str, prompts: str, answered: Sequence[Answered]) -> Result:
    first = [1e3 * one.first_token_s for one in answered]
    gaps = [1e3 * gap for one in answered for gap in one.gaps_s]
    p50, p99 = quantile(first, 0.5), quantile(first, 0.99)
    return Result(way, prompts, len(first), p50, p99, p99 / p50, quantile(gaps, 0.5), quantile(gaps, 0.99))


def results(way: str, answered: Sequence[Answered], preset: Preset) -> list[Result]:
    """Of the counted requests: short and long ones, where there are any."""
    counted = [one for one in answered if one.asked.counted]
    parts = {
        SHORT: [one for one in counted if len(one.asked.prompt) <= preset.short_tokens],
        LONG: [one for one in counted if len(one.asked.prompt) >= preset.long_tokens],
    }
    return [_summary(way, name, part) for name, part in parts.items() if part]


def totals_of(
    way: str,
    answered: Sequence[Answered],
    preset: Preset,
    engine: dict[str, float],
    peaks: dict[str, float],
) -> Totals:
    """See `Totals`."""
    counted = [one for one in answered if one.asked.counted]
    begin, end = min(one.started_s for one in counted), max(one.token_s[-1] for one in counted)
    firsts = [one for one in answered if begin <= one.token_s[0] <= end]
    tokens = sum(begin <= at <= end for one in answered for at in one.token_s)
    ended = sum(begin <= one.token_s[-1] <= end for one in answered)
    seconds = end - begin
    prompt_tokens = sum(len(one.asked.prompt) for one in firsts)
    beside = _beside_long(answered, preset)
    return Totals(way, seconds, ended / seconds, prompt_tokens / seconds, tokens / seconds, beside, engine, peaks)


def _beside_long(answered: Sequence[Answered], preset: Preset) -> float:
    waits = [(one.started_s, one.token_s[0]) for one in answered if len(one.asked.prompt) >= preset.long_tokens]
    short = [one for one in answered if one.asked.counted and len(one.asked.prompt) <= preset.short_tokens]
    beside = [any(a < one.token_s[0] and one.started_s < b for a, b in waits) for one in short]
    return sum(beside) / len(beside) if beside else 0.0
