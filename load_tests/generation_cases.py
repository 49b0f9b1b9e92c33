"""What `compare_generation.py` asks in a round, how its rate is read, and what rounds come to."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from generation import Way
from generation_results import DECODE, LLAMA, QUIET, TRANSFORMERS, Agreement, Rate
from rounds import median_ratio
from switch_engines import Answer, Prompt, decode_rate, prefill_rate, random_prompts

_COMPARED_TOKENS = 24  # of each answer; long ones differ after a while


@dataclass(frozen=True)
class Case:
    """What is asked at once, `repeats` times in a round, and how its rate is read."""

    phase: str
    sequences: int
    prompt_tokens: int
    max_tokens: int
    vocab_size: int
    repeats: int = 1

    def prompts(self, seed: int) -> list[Prompt]:
        """Other ones for each seed and each case, or a router that was asked before knows their beginnings: random
        numbers of the same seed begin alike, however many."""
        own = 1_000_000 * seed + 1_000 * self.sequences + self.prompt_tokens
        return random_prompts(self.vocab_size, self.sequences, self.prompt_tokens, own)

    def seeds(self, index: int) -> range:
        """Of a round's prompts."""
        return range(index * self.repeats, (index + 1) * self.repeats)

    def rate(self, prompts: Sequence[Prompt]) -> Callable[[list[Answer]], float]:
        """Tokens/s of answers to `prompts`."""
        return decode_rate if self.phase == DECODE else lambda answers: prefill_rate(prompts, answers)


def rounds_of(case: Case, way: Way, answers: list[list[Answer]]) -> Callable[[int], Awaitable[float]]:
    """Measures one round, told its index; the answers go to `answers`."""

    async def measure(index: int) -> float:
        found = []
        for seed in case.seeds(index):
            prompts = case.prompts(seed)
            answers.append(answer := await way.ask(prompts, case.max_tokens))
            found.append(case.rate(prompts)(answer))
        return statistics.harmonic_mean(found)  # of equally many tokens: all of them by all of the time

    return measure


def rate_of(weights: str, case: Case, name: str, rates: Mapping[str, Sequence[float]]) -> Rate:
    """Of one way, from tokens/s of all ways' rounds; those of `QUIET` pair with no others."""
    values, beside = rates[name], rates[TRANSFORMERS]
    quiet = [statistics.median(rates[QUIET])] * len(values)
    faster = quiet if quiet[0] > statistics.median(beside) else beside
    ratios = [value / other for value, other in zip(values, faster, strict=True)]
    llama_rates = next((found for way, found in rates.items() if way.startswith(LLAMA)), None)
    return Rate(
        *(weights, case.phase, case.sequences, name, statistics.median(values)),
        *(median_ratio(values, beside), median_ratio(values, quiet)),
        *(statistics.median(ratios), min(ratios), max(ratios)),
        None if llama_rates is None else median_ratio(values, llama_rates),
    )


def agreement_of(weights: str, case: Case, name: str, answers: Mapping[str, list[list[Answer]]]) -> Agreement:
    """Of one way's answers with those of transformers."""
    compared = min(case.max_tokens, _COMPARED_TOKENS)
    pairs = [
        (one.tokens[:compared], other.tokens[:compared])
        for ours, theirs in zip(answers[name], answers[TRANSFORMERS], strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    same = sum(common_tokens(one, other) for one, other in pairs)
    first = sum(one[0] == other[0] for one, other in pairs)
    return Agreement(weights, case.sequences, name, same, len(pairs) * compared, first, len(pairs))


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
