"""Sampling states without an engine, for the tests of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pimoe.runtime.generation.grammar import GrammarMatcher
from pimoe.runtime.generation.sampling_state import SamplingState
from pimoe.runtime.requests import GenerateRequest, SamplingParams


def state_of(
    params: SamplingParams,
    vocab: int,
    *,
    prompt: Sequence[int] = (0,),
    emitted: Sequence[int] = (),
    end_tokens: Sequence[int] = (),
    grammar: GrammarMatcher | None = None,
) -> SamplingState:
    """The state of a request that has `emitted` tokens behind it."""
    request = GenerateRequest("r", tuple(prompt), params, emitted=tuple(emitted))
    return SamplingState(request, vocab, tuple(end_tokens), grammar)


def state(
    vocab: int, *, prompt: Sequence[int] = (0,), emitted: Sequence[int] = (), **params: Any
) -> SamplingState:
    """The same, greedy unless told otherwise."""
    return state_of(SamplingParams(**{"temperature": 0.0, **params}), vocab, prompt=prompt, emitted=emitted)
