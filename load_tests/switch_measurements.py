"""What each switch of the engine costs and gains: the four measurements of `engine_switches.py`.

Of two engines that are compared only the switch in question differs; the others are at rest (no micro-batches, no
reuse). All ways take turns within a round, and in every round another one begins.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.generation.micro_batches import MicroBatchStatistics
from pimoe.runtime.local import LocalRuntime
from report import progress, quantile
from switch_engines import (
    Answer,
    DelayedGroup,
    ElsewhereGroup,
    Engine,
    Prompt,
    Wrap,
    decode_rate,
    opened,
    prefill_rate,
    random_prompts,
)
from switch_results import (
    ALWAYS,
    AUTO,
    DECODE,
    ELSEWHERE,
    LOCAL,
    NEVER,
    OFF,
    ON,
    PREFILL,
    SLOW,
    Budget,
    Decided,
    Proof,
    Rate,
    Reuse,
)

T = TypeVar("T")
_BLOCK_TOKENS = 16
_WARM_UP_TOKENS = 4
_ALTERNATIVES = 4
_NO_PROMPTS = "no prompts"
AT_ONCE, ONE_FIRST, NOTHING_SHARED = "shared, at once", "shared, one first", "nothing shared"


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        sequences: that decode at once, each from a prompt of `prompt_tokens`, `max_tokens` more.
        prefill: prompts at once, tokens of each.
        proof: requests that are asked alone and together, tokens of each answer.
        slow_link_s: what a slow link adds to each dispatch; `slow_sequences` decode over it.
        elsewhere_row_s: what groups elsewhere take for a row, over a slow link.
        learning_tokens: of the answers from which "auto" learns before it is measured.
        shared: prompts, tokens that they share, tokens of their own.
        budgets: `max_step_tokens` to compare; `decoding` sequences beside (prompts, tokens of each).
    """

    rounds: int = 3
    sequences: tuple[int, ...] = (1, 8, 32, 128)
    prompt_tokens: int = 8
    max_tokens: int = 18
    prefill: tuple[int, int] = (8, 256)
    proof: tuple[int, int] = (32, 8)
    slow_link_s: float = 0.002
    elsewhere_row_s: float = 50e-6
    slow_sequences: tuple[int, ...] = (32, 128)
    learning_tokens: int = 48
    shared: tuple[int, int, int] = (16, 512, 32)
    budgets: tuple[int, ...] = (128, 512, 2048)
    decoding: int = 8
    beside: tuple[int, int] = (4, 1024)


@dataclass(frozen=True)
class Loaded:
    """A model, with `batch_invariant` off and, where that is measured, on."""

    name: str
    runtimes: Mapping[str, LocalRuntime]

    @property
    def plain(self) -> LocalRuntime:
        """With everything off."""
        return self.runtimes[OFF]

    @property
    def context_tokens(self) -> int:
        """The longest sequence."""
        return self.plain.router.model.max_context_tokens

    def prompts(self, count: int, tokens: int, seed: int) -> list[Prompt]:
        """Random ones."""
        return random_prompts(self.plain.router.model.vocab_size, count, tokens, seed)


def limits_for(sequences: int, tokens: int, **switches: Any) -> EngineLimits:
    """Bounds of an engine for so many sequences of at most so many tokens, twice the blocks that these fill."""
    blocks = 2 * sequences * (-(-tokens // _BLOCK_TOKENS) + 1)
    at_rest = EngineLimits(sequences, kv_blocks=blocks, micro_batches="never", reuse_prefixes=False)
    return replace(at_rest, **switches)


async def take_turns(rounds: int, ways: Mapping[str, Callable[[int], Awaitable[T]]]) -> dict[str, list[T]]:
    """What each way gives in each round, which it is told. Every round begins with another one."""
    found: dict[str, list[T]] = {way: [] for way in ways}
    names = list(ways)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(await ways[name](index))
    return found


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Of what was measured in the same round: a machine that gets slower from round to round moves it little."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def _rates(model: str, phase: str, link: str, sequences: int, found: Mapping[str, Sequence[float]]) -> list[Rate]:
    base = next(iter(found.values()))
    return [
        Rate(model, phase, link, sequences, way, statistics.median(values), median_ratio(values, base))
        for way, values in found.items()
    ]


# Batch invariance ----------------------------------------------------------------------------------------------


async def batch_invariance(model: Loaded, preset: Preset) -> list[Rate]:
    """What it costs to decode and to prefill."""
    rows = []
    for sequences in preset.sequences:
        progress(f"{model.name}: batch_invariant, {sequences} sequences decode")
        prompts = model.prompts(sequences, preset.prompt_tokens, sequences)
        found = await _invariance(model, preset, prompts, preset.max_tokens, decode_rate)
        rows += _rates(model.name, DECODE, LOCAL, sequences, found)
    progress(f"{model.name}: batch_invariant, prefill")
    prompts = model.prompts(*preset.prefill, seed=0)
    found = await _invariance(model, preset, prompts, 1, lambda answers: prefill_rate(prompts, answers))
    return rows + _rates(model.name, PREFILL, LOCAL, len(prompts), found)


async def _invariance(
    model: Loaded,
    preset: Preset,
    prompts: list[Prompt],
    max_tokens: int,
    rate: Callable[[list[Answer]], float],
) -> dict[str, list[float]]:
    limits = limits_for(len(prompts), len(prompts[0]) + max_tokens)

    async def measure(engine: Engine) -> float:
        return rate(await engine.ask(prompts, max_tokens))

    async with AsyncExitStack() as stack:
        ways: dict[str, Callable[[int], Awaitable[float]]] = {}
        for way in (OFF, ON):
            engine = await stack.enter_async_context(opened(model.runtimes[way], limits))
            await engine.ask(prompts, min(max_tokens, _WARM_UP_TOKENS))
            ways[way] = lambda _, engine=engine: measure(engine)  # type: ignore[misc]
        return await take_turns(preset.rounds, ways)


async def proofs(model: Loaded, preset: Preset) -> list[Proof]:
    """Whether answers beside others are those given alone. The prompts differ in length, and micro-batches are as
    the engine decides, so that each step has another shape."""
    count, max_tokens = preset.proof
    prompts = [model.prompts(1, 3 + 2 * index, index)[0] for index in range(count)]
    limits = limits_for(count, 3 + 2 * count + max_tokens, micro_batches=AUTO)
    rows = []
    for way in (OFF, ON):
        progress(f"{model.name}: batch_invariant {way}, {count} requests alone and together")
        async with opened(model.runtimes[way], limits) as engine:
            alone = [(await engine.ask([prompt], max_tokens, _ALTERNATIVES))[0] for prompt in prompts]
            together = await engine.ask(prompts, max_tokens, _ALTERNATIVES)
        pairs = list(zip(alone, together, strict=True))
        rows.append(
            Proof(
                model.name,
                way,
                count,
                tokens_differ=sum(one.tokens != other.tokens for one, other in pairs),
                logprobs_differ=sum(one.logprobs != other.logprobs for one, other in pairs),
                first_tokens_differ=sum(one.logprobs[0] != other.logprobs[0] for one, other in pairs),
            )
        )
    return rows


# Micro-batches -------------------------------------------------------------------------------------------------


async def micro_batches(model: Loaded, preset: Preset) -> tuple[list[Rate], list[Decided]]:
    """Never, always, and as the engine decides; over links of this machine, and over slow ones."""
    rates: list[Rate] = []
    decided: list[Decided] = []
    for link, wrap in _links(preset).items():
        for sequences in preset.sequences if wrap is None else preset.slow_sequences:
            progress(f"{model.name}: micro_batches, {sequences} sequences, link {link}")
            prompts = model.prompts(sequences, preset.prompt_tokens, sequences)
            found, before, after = await _policies(model, preset, prompts, wrap)
            rates += _rates(model.name, DECODE, link, sequences, found)
            decided.append(_decided(model.name, link, sequences, before, after))
    return rates, decided


def _links(preset: Preset) -> dict[str, Wrap | None]:
    return {
        LOCAL: None,
        SLOW: lambda group: DelayedGroup(group, preset.slow_link_s),
        ELSEWHERE: lambda _: ElsewhereGroup(preset.slow_link_s, preset.elsewhere_row_s),
    }


async def _policies(
    model: Loaded, preset: Preset, prompts: list[Prompt], wrap: Wrap | None
) -> tuple[dict[str, list[float]], MicroBatchStatistics, MicroBatchStatistics]:
    longest = preset.prompt_tokens + max(preset.learning_tokens, preset.max_tokens)

    async def measure(engine: Engine) -> float:
        return decode_rate(await engine.ask(prompts, preset.max_tokens))

    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        for way in (NEVER, ALWAYS, AUTO):
            limits = limits_for(len(prompts), longest, micro_batches=way)
            engines[way] = await stack.enter_async_context(opened(model.plain, limits, wrap))
            await engines[way].ask(prompts, preset.learning_tokens if way == AUTO else _WARM_UP_TOKENS)
        before = engines[AUTO].statistics().micro_batches
        ways: dict[str, Callable[[int], Awaitable[float]]] = {
            way: lambda _, engine=engine: measure(engine)  # type: ignore[misc]
            for way, engine in engines.items()
        }
        found = await take_turns(preset.rounds, ways)
        return found, before, engines[AUTO].statistics().micro_batches


def _decided(
    model: str, link: str, sequences: int, before: MicroBatchStatistics, after: MicroBatchStatistics
) -> Decided:
    return Decided(
        model,
        link,
        sequences,
        after.single - before.single,
        after.double - before.double,
        after.probes - before.probes,
        1e3 * after.trunk_s,
        1e3 * after.expert_s,
        1e3 * after.link_s,
        after.predicted_gain,
        after.measured_gain,
    )


# Prefix reuse --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reused:
    prefilled_tokens: int
    first_token_s: float
    seconds: float


async def reuse_prefixes(model: Loaded, preset: Preset) -> list[Reuse]:
    """Of prompts with the same beginning, asked at once or after the first of them; and of others."""
    count, shared, own = preset.shared
    shared = min(shared, model.context_tokens - own - _BLOCK_TOKENS) // _BLOCK_TOKENS * _BLOCK_TOKENS
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
        answers = await engine.ask(prompts, _BLOCK_TOKENS)
        seconds = time.monotonic() - started
        first_token_s = statistics.median(answer.first_token_s for answer in answers)
        return _Reused(engine.statistics().prefill_tokens - before, first_token_s, seconds)

    async with AsyncExitStack() as stack:
        ways: dict[str, Callable[[int], Awaitable[_Reused]]] = {}
        for way in (OFF, ON):
            limits = limits_for(count, shared + own + _BLOCK_TOKENS, reuse_prefixes=way == ON)
            engine = await stack.enter_async_context(opened(model.plain, limits))
            await engine.ask(model.prompts(1, own, preset.rounds), _WARM_UP_TOKENS)
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
    tokens = min(tokens, model.context_tokens - _BLOCK_TOKENS)
    decoding = model.prompts(preset.decoding, preset.prompt_tokens, 1)
    longest = min(model.context_tokens, max(tokens, preset.prompt_tokens) + tokens)
    room = longest - preset.prompt_tokens
    async with AsyncExitStack() as stack:
        ways: dict[str, Callable[[int], Awaitable[_Beside]]] = {}
        for budget in preset.budgets:
            limits = limits_for(preset.decoding + count, longest, max_step_tokens=budget)
            engine = await stack.enter_async_context(opened(model.plain, limits))
            await engine.ask(decoding, _WARM_UP_TOKENS)
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
