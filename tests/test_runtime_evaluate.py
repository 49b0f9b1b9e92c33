"""The accuracy yardstick, and that the embedded model measures up to it in-process."""

from __future__ import annotations

import asyncio

import engines  # noqa: F401 (one thread)
import pytest
from pimoe.runtime.embedded import CHECKPOINT, SKILLS, held_out
from pimoe.runtime.embedded.evaluate import MAX_ANSWER_TOKENS, SkillScore, evaluate
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.model.tokenizer import Tokenizer
from pimoe.runtime.requests import GenerateRequest, SamplingParams

SAMPLES = 40


def answers() -> dict[str, str]:
    return {example.prompt: example.answer for skill in SKILLS for example in held_out(skill, SAMPLES)}


async def test_exact_answers_are_counted_skill_by_skill() -> None:
    right = answers()
    wrong = {example.prompt for example in held_out("upper", SAMPLES)[:5]}

    async def answer(prompt: str) -> str:
        return "no" if prompt in wrong else right[prompt]

    scores = await evaluate(answer, SAMPLES)
    assert [score.skill for score in scores] == list(SKILLS)
    for score in scores:
        assert score.total == SAMPLES
        assert score.exact == SAMPLES - (5 if score.skill == "upper" else 0)
        assert score.accuracy == score.exact / SAMPLES
    upper = next(score for score in scores if score.skill == "upper")
    assert len(upper.wrong) == 3, "a few examples of what went wrong"
    assert all(example.prompt in wrong and said == "no" for example, said in upper.wrong)


async def test_only_the_skills_asked_for() -> None:
    right = answers()

    async def answer(prompt: str) -> str:
        return right[prompt]

    assert await evaluate(answer, 3, ["add"]) == [SkillScore("add", 3, 3)]
    with pytest.raises(ValueError, match="dance"):
        await evaluate(answer, 3, ["dance"])


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_no_more_are_asked_at_once_than_said(concurrency: int) -> None:
    asking = most = 0

    async def answer(prompt: str) -> str:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        await asyncio.sleep(0)
        asking -= 1
        return ""

    await evaluate(answer, SAMPLES, ["add"], concurrency)
    assert most == concurrency


async def test_a_failing_answer_stops_everything_and_surfaces() -> None:
    asked = 0

    async def answer(prompt: str) -> str:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise ConnectionError("the server is gone")
        await asyncio.sleep(0)
        return ""

    with pytest.raises(ConnectionError, match="gone"):
        await evaluate(answer, SAMPLES, ["add", "sort"], concurrency=2)
    asked_then = asked
    for _ in range(10):
        await asyncio.sleep(0)
    assert asked == asked_then < SAMPLES


async def test_the_embedded_model_is_right_in_95_of_100() -> None:
    """Two groups in this process, prompts that training never saw."""
    tokenizer = Tokenizer.load(CHECKPOINT)
    assert tokenizer is not None
    async with await LocalRuntime.start(CHECKPOINT, groups=2) as runtime:

        async def answer(prompt: str) -> str:
            sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0)
            asked = GenerateRequest("r", tuple(tokenizer.encode(prompt)), sampling)
            tokens = [token async for chunk in runtime.router.generate(asked) for token in chunk.token_ids]
            return tokenizer.decode(tokens)

        scores = await evaluate(answer, 100, concurrency=32)
    assert {score.skill: score.wrong for score in scores if score.accuracy < 0.95} == {}
