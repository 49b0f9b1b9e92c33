"""What a generation's state remembers: bans, and grammars against `min_tokens` and `ignore_eos`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from grammars import EMBEDDED, EMBEDDED_END, EMBEDDED_VOCAB, compiled
from pimoe.runtime.generation.grammar_compiler import GrammarCompiler
from pimoe.runtime.generation.sampler import sample
from pimoe.runtime.generation.sampling_state import SamplingState
from pimoe.runtime.requests import SamplingParams
from samplers import state, state_of

END = EMBEDDED_END[0]
FAVOURITES = {END: 9.0, ord("b"): 5.0, ord("a"): 4.0, ord("z"): 3.0}


@pytest.fixture
async def compiler() -> AsyncIterator[GrammarCompiler]:
    compiler = GrammarCompiler(EMBEDDED, EMBEDDED_VOCAB, EMBEDDED_END)
    yield compiler
    compiler.close()


async def state_within(compiler: GrammarCompiler, regex: str, **params: Any) -> SamplingState:
    matcher = await compiled(compiler, "regex", regex)
    greedy = SamplingParams(**{"temperature": 0.0, **params})
    return state_of(greedy, EMBEDDED_VOCAB, end_tokens=EMBEDDED_END, grammar=matcher)


def answer(asked: SamplingState, most: int = 20) -> list[int]:
    """What a model says that always wants the same: the end, then b, a, z."""
    logits = torch.zeros(1, EMBEDDED_VOCAB)
    for token, logit in FAVOURITES.items():
        logits[0, token] = logit
    chosen: list[int] = []
    while len(chosen) < most and not asked.finished_by_grammar:
        (token,), _ = sample(logits, [asked], [len(chosen)])
        asked.advance(token)
        chosen.append(token)
        assert asked.error is None
    return chosen


def test_what_asks_for_nothing_alters_nothing() -> None:
    assert not state(10).alters_logits
    assert not state(10, temperature=1.0, top_p=0.5, stop_token_ids=(3,), ignore_eos=True).alters_logits
    assert not state(10, min_tokens=2, emitted=(1, 1), stop_token_ids=(3,)).alters_logits
    for params in (
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": ((1, 1.0),)},
        {"min_tokens": 1, "stop_token_ids": (3,)},
    ):
        assert state(10, **params).alters_logits


def test_the_answer_may_end_once_it_has_min_tokens() -> None:
    asked = state_of(SamplingParams(min_tokens=3, stop_token_ids=(5,)), 10, emitted=(1,), end_tokens=(7, 8))
    bans = [asked.banned]
    for token in (2, 3):
        asked.advance(token)
        bans.append(asked.banned)
    assert bans == [(7, 8, 5), (7, 8, 5), ()]


def test_end_tokens_that_the_vocabulary_lacks_are_left_out() -> None:
    asked = state_of(SamplingParams(min_tokens=1), 10, end_tokens=(7, 10, 99))
    assert asked.banned == (7,)
    assert sample(torch.ones(1, 10), [asked], [0])[0] != [7]


def test_a_state_made_of_emitted_tokens_is_that_which_saw_them() -> None:
    params: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 4}
    seen = state(10, prompt=(3, 4), **params)
    resumed = state(10, prompt=(3, 4), emitted=(1, 1, 9), **params)
    for token in (1, 1, 9):
        seen.advance(token)
    logits = torch.linspace(-1, 1, 10)[None]
    assert seen.generated == resumed.generated == 3
    assert sample(logits, [seen], [5]) == sample(logits, [resumed], [5])
    assert seen.counts is not None
    assert resumed.counts is not None
    assert seen.counts.tokens.tolist() == resumed.counts.tokens.tolist()


# Grammars against what else says when an answer ends.


async def test_an_answer_ends_where_the_grammar_lets_the_model_end_it(compiler: GrammarCompiler) -> None:
    assert answer(await state_within(compiler, "[ab]{2,5}")) == [*b"bb", END]


async def test_an_answer_ends_where_the_grammar_allows_nothing_more(compiler: GrammarCompiler) -> None:
    assert answer(await state_within(compiler, "z{3}")) == [*b"zzz"]


async def test_a_grammar_goes_on_for_min_tokens_where_it_can(compiler: GrammarCompiler) -> None:
    assert answer(await state_within(compiler, "[ab]{2,5}", min_tokens=4)) == [*b"bbbb", END]


async def test_a_grammar_that_is_complete_overrules_min_tokens(compiler: GrammarCompiler) -> None:
    assert answer(await state_within(compiler, "[ab]{2,5}", min_tokens=9)) == [*b"bbbbb"]


async def test_a_stop_token_comes_before_min_tokens_where_the_grammar_has_nothing_else(
    compiler: GrammarCompiler,
) -> None:
    stopping = {"stop_token_ids": (ord("b"), ord("z")), "min_tokens": 9}
    assert answer(await state_within(compiler, "[ab]{2}z", **stopping)) == [*b"aaz"]


async def test_with_ignore_eos_only_the_grammar_ends_the_answer(compiler: GrammarCompiler) -> None:
    assert answer(await state_within(compiler, "[ab]{2,5}", ignore_eos=True)) == [*b"bbbbb"]
    assert answer(await state_within(compiler, "[ab]*", ignore_eos=True), 7) == [*b"bbbbbbb"]


async def test_a_bias_cannot_leave_the_grammar(compiler: GrammarCompiler) -> None:
    biased = await state_within(compiler, "[ab]{2}z", logit_bias=((ord("z"), 100.0), (ord("b"), -100.0)))
    assert answer(biased) == [*b"aaz"]
