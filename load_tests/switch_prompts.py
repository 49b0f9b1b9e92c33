"""What the switches that concern prompts cost and gain: prefix reuse and the prefill budget."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from report import progress, quantile
from rounds import median_ratio, take_turns
from switch_engines import Answer, Engine, Prompt, decode_rate, opened, prefill_rate
from switch_results import OFF, ON, Budget, Reuse
from switch_steps import (
    BLOCK_TOKENS,
    WARM_UP_TOKENS,
    Loaded,
    Preset,
    limits_for,
)

_NO_PROMPTS = "no prompts"
AT_ONCE, ONE_FIRST, NOTHING_SHARED = "shared, at once", "shared, one first", "nothing shared"

# Prefix reuse --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reused:
    prefilled_tokens: int
    first_token_s: float
    seconds: float


async def reuse_prefixes(model: Loaded, preset: Preset) -> list[Reuse]:
    """Of prompts with the same beginning, asked at once or after the first of them; and of others."""
    count, shared, own = preset.shared
    shared = min(shared, model.context_tokens - own - BLOCK_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
    rows = []
    for kind in (ONE_FIRST, AT_ONCE, NOTHING_SHARED):
        progress(f"{model.name}: reuse_prefixes, {kind}")
        found = await _reused(model, preset, kind, count, shared, own)
        off = found[OFF]
        for way, values in found.items():
            firsts, seconds = [v.first_token_s for v in values], [v.seconds for v in values]
            rows.append(
                Reuse(
                    model.name,
                    kind,
                    shared + own,
                    way,
                    values[0].prefilled_tokens,
                    1e3 * statistics.median(firsts),
                    median_ratio(firsts, [v.first_token_s for v in off]),
                    statistics.median(seconds),
                    median_ratio(seconds, [v.seconds for v in off]),
                )
            )
    return rows


async def _reused(
    model: Loaded, preset: Preset, kind: str, count: int, shared: int, own: int
) -> dict[str, list[_Reused]]:
    async def measure(engine: Engine, index: int) -> _Reused:
        prompts = model.prompts(count, shared + own, index)  # others in every round: nothing is known of them
        if kind != NOTHING_SHARED:
            prompts = [prompts[0][:shared] + prompt[shared:] for prompt in prompts]
        before = engine.statistics().prefill_tokens
        if kind == ONE_FIRST:
            await engine.ask(prompts[:1], 1)
            prompts = prompts[1:]
        started = time.monotonic()
        answers = await engine.ask(prompts, BLOCK_TOKENS)
        seconds = time.monotonic() - started
        first_token_s = statistics.median(answer.first_token_s for answer in answers)
        return _Reused(engine.statistics().prefill_tokens - before, first_token_s, seconds)

    async with AsyncExitStack() as stack:
        ways: dict[str, Callable[[int], Awaitable[_Reused]]] = {}
        for way in (OFF, ON):
            limits = limits_for(count, shared + own + BLOCK_TOKENS, reuse_prefixes=way == ON)
            engine = await stack.enter_async_context(opened(model.plain, limits))
            await engine.ask(model.prompts(1, own, preset.rounds), WARM_UP_TOKENS)
            ways[way] = lambda index, engine=engine: measure(engine, index)  # type: ignore[misc]
        return await take_turns(preset.rounds, ways)


# Prefill budgets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Beside:
    """Seconds between tokens, tokens/s of prompts, tokens/s decoded."""

    between: list[float]
    prompt_rate: float
    decode_rate: float


async def budgets(model: Loaded, preset: Preset) -> list[Budget]:
    """What decoding sequences notice of long prompts, and what these notice of the budget."""
    progress(f"{model.name}: max_step_tokens")
    count, tokens = preset.beside
    tokens = min(tokens, model.context_tokens - BLOCK_TOKENS)
    decoding = model.prompts(preset.decoding, preset.prompt_tokens, 1)
    longest = min(model.context_tokens, max(tokens, preset.prompt_tokens) + tokens)
    room = longest - preset.prompt_tokens
    async with AsyncExitStack() as stack:
        ways: dict[str, Callable[[int], Awaitable[_Beside]]] = {}
        for budget in preset.budgets:
            limits = limits_for(preset.decoding + count, longest, max_step_tokens=budget)
            engine = await stack.enter_async_context(opened(model.plain, limits))
            await engine.ask(decoding, WARM_UP_TOKENS)
            ways[str(budget)] = lambda index, engine=engine: _beside(  # type: ignore[misc]
                engine, decoding, room, model.prompts(count, tokens, index)
            )
        ways[_NO_PROMPTS] = lambda _: _undisturbed(engine, decoding, preset.max_tokens)
        found = await take_turns(preset.rounds, ways)
    return _budget_rows(model.name, tokens, found)


async def _beside(engine: Engine, decoding: Sequence[Prompt], room: int, long: Sequence[Prompt]) -> _Beside:
    answers = [Answer(time.monotonic()) for _ in decoding]
    reads = [
        asyncio.create_task(engine.read(answer, prompt, room))
        for answer, prompt in zip(answers, decoding, strict=True)
    ]
    for answer in answers:
        await answer.begun.wait()
    started = time.monotonic()
    rate = prefill_rate(long, await engine.ask(long, 1))
    ended = time.monotonic()
    for answer in answers:
        answer.wanted_more = False
    await asyncio.gather(*reads)
    between = _between(answers, started, ended)
    return _Beside(between, rate, len(between) / (ended - started))


async def _undisturbed(engine: Engine, decoding: Sequence[Prompt], max_tokens: int) -> _Beside:
    answers = await engine.ask(decoding, max_tokens)
    begin, end = max(answer.at[0] for answer in answers), min(answer.at[-1] for answer in answers)
    return _Beside(_between(answers, begin, end), 0.0, decode_rate(answers))


def _between(answers: Sequence[Answer], begin: float, end: float) -> list[float]:
    """Seconds from a token to the next, of those that are waited for within a time."""
    pairs = [pair for answer in answers for pair in zip(answer.at, answer.at[1:], strict=False)]
    return [after - before for before, after in pairs if after > begin and before < end]


def _budget_rows(model: str, tokens: int, found: Mapping[str, Sequence[_Beside]]) -> list[Budget]:
    def p99(values: Sequence[_Beside]) -> list[float]:
        return [quantile(value.between, 0.99) for value in values]

    smallest = next(iter(found.values()))
    return [
        Budget(
            model,
            tokens,
            way,
            1e3 * statistics.median(quantile(value.between, 0.5) for value in values),
            1e3 * statistics.median(p99(values)),
            median_ratio(p99(values), p99(smallest)),
            statistics.median(value.prompt_rate for value in values),
            median_ratio([value.prompt_rate for value in values], [value.prompt_rate for value in smallest]),
            statistics.median(value.decode_rate for value in values),
        )
        for way, values in found.items()
    ]
