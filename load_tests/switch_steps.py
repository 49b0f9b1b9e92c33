"""What each switch of the engine costs and gains: batch invariance and micro-batches. See `switch_prompts.py`
for the others.

Of two engines that are compared only the switch in question differs; the others are at rest (no micro-batches, no
reuse). All ways take turns within a round, and in every round another one begins.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.generation.micro_batches import MicroBatchStatistics
from pimoe.runtime.local import LocalRuntime
from report import progress
from rounds import median_ratio, take_turns
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
    Decided,
    Proof,
    Rate,
)

BLOCK_TOKENS = 16
WARM_UP_TOKENS = 4
_ALTERNATIVES = 4


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
        decoder = self.plain.router.decoder
        assert decoder is not None
        return decoder.spec.max_context_tokens  # what the runtime's own small engine takes is less

    def prompts(self, count: int, tokens: int, seed: int) -> list[Prompt]:
        """Random ones."""
        return random_prompts(self.plain.router.model.vocab_size, count, tokens, seed)


def limits_for(sequences: int, tokens: int, **switches: Any) -> EngineLimits:
    """Bounds of an engine for so many sequences of at most so many tokens, twice the blocks that these fill."""
    blocks = 2 * sequences * (-(-tokens // BLOCK_TOKENS) + 1)
    at_rest = EngineLimits(sequences, kv_blocks=blocks, micro_batches="never", reuse_prefixes=False)
    return replace(at_rest, **switches)


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
            await engine.ask(prompts, min(max_tokens, WARM_UP_TOKENS))
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
            await engines[way].ask(prompts, preset.learning_tokens if way == AUTO else WARM_UP_TOKENS)
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
