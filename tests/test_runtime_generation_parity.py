"""Every family decodes as transformers does, through each of the paths that a generation may take.

Experts are in two groups and everything is float32. What a path must show of itself (chunks, reuse, preemptions,
two micro-batches) is asserted, so that none of them is passed by unnoticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, NATIVE_SIZES, make_checkpoint, reference_model
from engines import Answer, at_rest, make_engine, prompt_of, read, request
from pimoe.runtime.generation.engine import Engine
from waiting import eventually, nothing_left_behind, within_patience  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TOKENS = 64
# Two begin alike over several blocks; one is of a single token.
_COMMON = prompt_of(33)
PROMPTS = [(*_COMMON, *prompt_of(4)), (*_COMMON, *prompt_of(11)), prompt_of(19), prompt_of(1)]

# Checkpoints: those of all families, and what only some configs of a family have.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {} if family.startswith("deepseek") else NATIVE_SIZES) for family in FAMILIES},
    "mixtral with a window": ("mixtral", {"sliding_window": 21, **NATIVE_SIZES}),
    "qwen3 by torch": ("qwen3_moe", {}),
}


@dataclass(frozen=True)
class Reference:
    """Of transformers, for each prompt: greedy tokens, the log-probabilities at each of them (`[64, vocab]`), and
    those of the prompt's own tokens but the first."""

    tokens: list[list[int]]
    logprobs: list[torch.Tensor]
    prompt_logprobs: list[list[float]]


_FOLDERS: dict[str, tuple[Path, Reference]] = {}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A checkpoint and what transformers says of the prompts."""
    family, overrides = MODELS[request.param]
    if request.param not in _FOLDERS:
        folder = make_checkpoint(family, tmp_path_factory.mktemp(family), **overrides)
        _FOLDERS[request.param] = folder, _reference(folder)
    return _FOLDERS[request.param]


@torch.inference_mode()
def _reference(folder: Path) -> Reference:
    model = reference_model(folder)
    found = Reference([], [], [])
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
        logprobs = torch.log_softmax(model(whole).logits[0].float(), -1)
        found.tokens.append(whole[0, len(prompt) :].tolist())
        found.logprobs.append(logprobs[len(prompt) - 1 : -1])
        found.prompt_logprobs.append(logprobs[: len(prompt) - 1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


@dataclass(frozen=True)
class Way:
    """A way to compute the same.

    Attributes:
        shows: what an engine that went it tells of it.
        options: of the engine, which force it.
        warm: whether every prompt was asked for before.
        sampling: what else is asked for.
    """

    shows: Callable[[Engine, list[Answer]], bool]
    options: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)


def chunked(engine: Engine, answers: list[Answer]) -> bool:
    # The longest prompt's 44 tokens take 6 steps of 8 at least before its first token.
    return engine.statistics().steps >= TOKENS + 5


def preempted(engine: Engine, answers: list[Answer]) -> bool:
    return engine.statistics().preemptions > 0


def reused(engine: Engine, answers: list[Answer]) -> bool:
    size = engine.limits.block_tokens
    expected = [(len(prompt) - 1) // size * size for prompt in PROMPTS]
    return [answer.chunks[0].cached_tokens for answer in answers] == expected


def in_two(engine: Engine, answers: list[Answer]) -> bool:
    return engine.statistics().micro_batches.double > TOKENS // 2


def everything(engine: Engine, answers: list[Answer]) -> bool:
    hits = engine.statistics().kv_blocks.prefix_hit_tokens
    return all(shown(engine, answers) for shown in (chunked, preempted, in_two)) and hits > 0


# Blocks for one of the longest, of 44 + 64 tokens, and for a part of the others.
_TIGHT = {"block_tokens": 4, "kv_blocks": 40}
_CROWDED = {**_TIGHT, "max_step_tokens": 8, "micro_batches": "always"}
WAYS = {
    # The prompt that begins like another one waits for that one's blocks, a step long.
    "plain": Way(lambda engine, _: engine.statistics().steps == TOKENS + 1),
    "chunked": Way(chunked, {"max_step_tokens": 8}),
    "reused": Way(reused, {"block_tokens": 8}, warm=True),
    "preempted": Way(preempted, _TIGHT),
    "in two": Way(in_two, {"micro_batches": "always"}),
    "everything": Way(everything, _CROWDED, warm=True),
    "prompt logprobs": Way(preempted, {**_TIGHT, "max_step_tokens": 12}, sampling={"prompt_logprobs": 0}),
}


@pytest.mark.parametrize("way", WAYS)
async def test_64_greedy_tokens_are_those_of_transformers(model: tuple[Path, Reference], way: str) -> None:
    folder, reference = model
    going = WAYS[way]
    engine = make_engine(folder, groups=2, **going.options)
    engine.start()
    for max_tokens in (1, TOKENS) if going.warm else (TOKENS,):
        asked = [request(prompt, max_tokens, logprobs=0, **going.sampling) for prompt in PROMPTS]
        answers = await asyncio.gather(*(read(engine.generate(one)) for one in asked))
    for index, answer in enumerate(answers):
        expect_of(answer, index, reference)
        if going.sampling:
            expect_prompt_logprobs(answer, index, reference)
    assert going.shows(engine, answers)
    await eventually(lambda: at_rest(engine))
    await within_patience(engine.close())


def expect_of(answer: Answer, index: int, reference: Reference, count: int = TOKENS) -> None:
    assert answer.error is None
    assert answer.tokens == reference.tokens[index][:count]
    assert [item.token_id for item in answer.logprobs] == answer.tokens
    theirs = reference.logprobs[index][:count].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert [item.logprob for item in answer.logprobs] == pytest.approx(theirs.tolist(), abs=1e-4)


def expect_prompt_logprobs(answer: Answer, index: int, reference: Reference) -> None:
    told: Sequence[Any] = answer.chunks[0].prompt_logprobs or ()
    assert told[0] is None
    assert [item.token_id for item in told[1:]] == list(PROMPTS[index][1:])
    assert [item.logprob for item in told[1:]] == pytest.approx(reference.prompt_logprobs[index], abs=1e-4)


async def test_batch_invariant_engines_give_the_same_bits_whatever_happens(model: tuple[Path, Reference]) -> None:
    folder, reference = model
    asked = [request(prompt, 24, logprobs=0) for prompt in PROMPTS]
    answers: list[list[Answer]] = []
    # In blocks of one size: of a window, as much is read as they hold.
    quiet = {"max_sequences": 1, "block_tokens": 4, "reuse_prefixes": False}
    for options in (quiet, {**_CROWDED, "kv_blocks": 24}):
        engine = make_engine(folder, groups=2, batch_invariant=True, **options)
        engine.start()
        answers.append(await asyncio.gather(*(read(engine.generate(one)) for one in asked)))
        await eventually(lambda engine=engine: at_rest(engine))
        await within_patience(engine.close())
    assert engine.statistics().preemptions
    for index, (alone, crowded) in enumerate(zip(*answers, strict=True)):
        assert [item.logprob for item in crowded.logprobs] == [item.logprob for item in alone.logprobs]
        expect_of(crowded, index, reference, 24)


def test_the_reference_tells_the_prompts_apart(model: tuple[Path, Reference]) -> None:
    """Were they alike, a sequence that got another's tokens would go unnoticed."""
    _, reference = model
    assert len({tuple(tokens) for tokens in reference.tokens}) == len(PROMPTS)
