"""The embedded model answers alike on every path through the engine, and as well as it was trained to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engines  # noqa: F401 (one thread)
import pytest
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.embedded.evaluate import MAX_ANSWER_TOKENS
from pimoe.runtime.embedded.skills import SKILLS, Example, held_out, is_exact
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.model.tokenizer import Tokenizer
from pimoe.runtime.requests import GenerateRequest, SamplingParams
from pimoe.runtime.router.limits import RouterLimits

EXAMPLES = [example for skill in SKILLS for example in held_out(skill, 8)]


@dataclass(frozen=True)
class Way:
    """How to start a runtime, and a count of its engine that shows that the path was really taken."""

    engine: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    shows: str = ""
    repeated: bool = False


WAYS = {
    "prompts in chunks": Way({"max_step_tokens": 5}),
    "known prefixes": Way({"block_tokens": 4}, shows="prefix_hit_tokens", repeated=True),
    "preemption": Way({"kv_blocks": 24, "block_tokens": 4}, shows="preemptions"),
    "two micro-batches": Way({"micro_batches": "always"}, shows="double"),
    "batch invariance": Way({}, {"batch_invariant": True}),
    "group processes": Way({}, {"isolation": "processes"}),
    "all at once": Way(
        {"max_step_tokens": 9, "kv_blocks": 24, "block_tokens": 4, "micro_batches": "always"},
        {"batch_invariant": True},
        shows="preemptions",
    ),
}


async def answers(way: Way) -> tuple[list[str], dict[str, Any]]:
    """The answers to all examples, asked at once, and what the engine counted."""
    tokenizer = Tokenizer.load(Path(CHECKPOINT))
    assert tokenizer is not None
    limits = RouterLimits(engine=EngineLimits(**way.engine))
    async with await LocalRuntime.start(Path(CHECKPOINT), groups=2, limits=limits, **way.start) as runtime:

        async def ask(example: Example) -> str:
            prompt = tuple(tokenizer.encode(example.prompt))
            asked = GenerateRequest("r", prompt, SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0))
            tokens: list[int] = []
            async for chunk in runtime.router.generate(asked):
                tokens += chunk.token_ids
            return tokenizer.decode(tokens)

        if way.repeated:
            await asyncio.gather(*(ask(example) for example in EXAMPLES))
        texts = await asyncio.gather(*(ask(example) for example in EXAMPLES))
        assert runtime.router.engine is not None
        plain = runtime.router.engine.statistics().as_plain()
    return texts, {**plain, **plain["kv_blocks"], **plain["micro_batches"]}


@pytest.fixture(scope="module")
def plain_answers() -> list[str]:
    texts, _ = asyncio.run(answers(Way()))
    return texts


def test_the_plain_path_is_as_good_as_it_was_trained_to_be(plain_answers: list[str]) -> None:
    exact = sum(map(is_exact, EXAMPLES, plain_answers))
    assert exact >= 0.95 * len(EXAMPLES)


@pytest.mark.parametrize("name", WAYS)
def test_every_path_gives_the_same_answers(name: str, plain_answers: list[str]) -> None:
    texts, counted = asyncio.run(answers(WAYS[name]))
    assert texts == plain_answers
    if shows := WAYS[name].shows:
        assert counted[shows] > 0, f"{name} was not what happened"
