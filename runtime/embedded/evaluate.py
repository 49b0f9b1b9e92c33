"""The accuracy yardstick: exact answers per skill of the embedded model, whoever computes them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ..tasks import gather_or_cancel
from .skills import SKILLS, Example, held_out, is_exact

# Completes one prompt, greedily, and returns the text.
Answer = Callable[[str], Awaitable[str]]

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SkillScore:
    """Exact answers to held-out prompts of one skill, and up to a few of the wrong ones."""

    skill: str
    exact: int
    total: int
    wrong: tuple[tuple[Example, str], ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of exact answers, 0 to 1."""
        return self.exact / self.total


async def evaluate(
    answer: Answer, samples: int, skills: Sequence[str] = SKILLS, concurrency: int = 16
) -> list[SkillScore]:
    """Ask `samples` held-out prompts of every skill, `concurrency` at a time.

    Raises:
        ValueError: an unknown skill. Whatever `answer` raises.
    """
    slots = asyncio.Semaphore(concurrency)

    async def ask(example: Example) -> str:
        async with slots:
            return await answer(example.prompt)

    scores = []
    for skill in skills:
        examples = held_out(skill, samples)
        completions = await gather_or_cancel([ask(example) for example in examples])
        pairs = list(zip(examples, completions, strict=True))
        wrong = [pair for pair in pairs if not is_exact(*pair)]
        scores.append(SkillScore(skill, len(pairs) - len(wrong), len(pairs), tuple(wrong[:3])))
    return scores
