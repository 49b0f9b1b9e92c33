"""What a request may ask for and where it ends, as pure functions; the engine's tests see them at work."""

from __future__ import annotations

import math
from typing import Any

import pytest
from engines import request
from pimoe.runtime.errors import ContextLengthError, InvalidRequestError
from pimoe.runtime.generation.rules import (
    MAX_LOGPROBS,
    banned_tokens,
    check_request,
    check_sampling,
    finish_reason,
)
from pimoe.runtime.requests import GenerateRequest, GrammarKind, SamplingParams


@pytest.mark.parametrize(
    "asked",
    [
        request((0,), 1),
        request((9, 0), 8),
        request((1,), 9, emitted=range(9)),
        request((1, 2), 3, stop_token_ids=(0, 9), emitted=(9,)),
    ],
)
def test_what_fits_may_run(asked: GenerateRequest) -> None:
    check_request(asked, vocab_size=10, max_context_tokens=10)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request((), 1), "at least one prompt token"),
        (request((1,), 0), "max_tokens of at least 1"),
        (request((1,), -3), "max_tokens of at least 1"),
        (request((10,), 1), "in prompt is outside of the vocabulary of 10"),
        (request((3, -1, 3), 1), "in prompt is outside"),
        (request((1,), 3, emitted=(10,)), "in emitted is outside"),
        (request((1,), 3, emitted=(1, 2, 3, 4)), "4 tokens were emitted of at most 3"),
        (request((1,), 3, stop_token_ids=(1, 10)), "in stop_token_ids is outside"),
    ],
)
def test_what_would_harm_a_step_may_not_run(asked: GenerateRequest, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_request(asked, vocab_size=10, max_context_tokens=10)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 2, "top_p": 1e-9, "min_p": 1, "top_k": 0, "min_tokens": 0},
        {"temperature": 0, "top_p": 1, "min_p": 0, "top_k": 1 << 40, "min_tokens": 1 << 40},
        {"repetition_penalty": 1e-9, "presence_penalty": -2, "frequency_penalty": 2.0},
        {"repetition_penalty": 10, "logprobs": 0, "prompt_logprobs": MAX_LOGPROBS},
        {"logit_bias": ((0, -100), (9, 100.0)), "stop_token_ids": (0, 9) * 512},
        {"grammar_kind": "json_object"},
        {"grammar_kind": "regex", "grammar": "a"},
    ],
)
def test_parameters_may_reach_the_ends_of_their_ranges(params: dict[str, Any]) -> None:
    check_request(request((1,), 3, **params), vocab_size=10, max_context_tokens=10)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, "temperature is -0.1; it must be at least 0 and finite"),
        ("temperature", math.inf, "at least 0 and finite"),
        ("temperature", math.nan, "temperature is nan"),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0 and at most 1"),
        ("top_p", 1.001, "at most 1"),
        ("top_p", math.nan, "top_p is nan"),
        ("min_p", -1e-9, "min_p is -1e-09; it must be at least 0 and at most 1"),
        ("min_p", 2, "min_p is 2"),
        ("top_k", -1, "top_k is -1; it must be at least 0"),
        ("min_tokens", -1, "min_tokens is -1; it must be at least 0"),
        ("repetition_penalty", 0, "repetition_penalty is 0; it must be above 0 and at most 10"),
        ("repetition_penalty", -1, "repetition_penalty is -1"),
        ("repetition_penalty", math.inf, "repetition_penalty is inf"),
        ("presence_penalty", 2.1, "presence_penalty is 2.1; it must be at least -2 and at most 2"),
        ("presence_penalty", math.nan, "presence_penalty is nan"),
        ("frequency_penalty", -3, "frequency_penalty is -3"),
        ("logprobs", -1, "logprobs is -1; it must be at least 0 and at most 256"),
        ("logprobs", MAX_LOGPROBS + 1, "logprobs is 257"),
        ("prompt_logprobs", -1, "prompt_logprobs is -1"),
        ("prompt_logprobs", 100_000, "prompt_logprobs is 100000"),
        ("stop_token_ids", (1,) * 1025, "stop_token_ids has 1025 entries; at most 1024"),
        ("logit_bias", ((10, 1.0),), "a token id in logit_bias is outside of the vocabulary of 10"),
        ("logit_bias", ((-1, 1.0),), "a token id in logit_bias is outside"),
        ("logit_bias", ((1, 100.5),), "logit_bias of token 1 is 100.5; it must be from -100 to 100"),
        ("logit_bias", ((1, math.nan),), "logit_bias of token 1 is nan"),
        ("logit_bias", ((1, -math.inf),), "logit_bias of token 1 is -inf"),
        ("logit_bias", ((1, 1.0), (2, 1.0), (1, 2.0)), "logit_bias names a token twice"),
        ("logit_bias", tuple((1, 1.0) for _ in range(1025)), "logit_bias has 1025 entries; at most 1024"),
        ("grammar_kind", "yaml", "grammar_kind is 'yaml'; it must be one of"),
        ("grammar", "a", "grammar must be empty with grammar_kind ''"),
    ],
)
def test_parameters_out_of_their_ranges_are_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_request(request((1,), 3, **{name: value}), vocab_size=10, max_context_tokens=10)
    assert caught.value.param == name


@pytest.mark.parametrize("kind", ["json_schema", "regex", "choice", "lark"])
def test_a_kind_of_grammar_needs_one(kind: GrammarKind) -> None:
    with pytest.raises(InvalidRequestError, match="grammar is empty") as caught:
        check_sampling(SamplingParams(grammar_kind=kind))
    assert caught.value.param == "grammar"
    with pytest.raises(InvalidRequestError, match="grammar must be empty with grammar_kind 'json_object'"):
        check_sampling(SamplingParams(grammar_kind="json_object", grammar="{}"))


def test_prompt_and_answer_must_fit_the_context() -> None:
    with pytest.raises(
        ContextLengthError, match="the prompt's 4 tokens and max_tokens 7 exceed the context of 10"
    ):
        check_request(request((1, 2, 3, 4), 7), vocab_size=10, max_context_tokens=10)


@pytest.mark.parametrize(
    ("asked", "token", "generated", "reason"),
    [
        (request((1,), 5), 3, 4, None),
        (request((1,), 5), 3, 5, "length"),
        (request((1,), 5), 3, 6, "length"),
        (request((1,), 5), 7, 1, "stop"),
        (request((1,), 5), 7, 5, "stop"),
        (request((1,), 5, ignore_eos=True), 7, 1, None),
        (request((1,), 5, ignore_eos=True), 7, 5, "length"),
        (request((1,), 5, ignore_eos=True, stop_token_ids=(7,)), 7, 1, "stop"),
        (request((1,), 5, stop_token_ids=(3,)), 3, 1, "stop"),
    ],
)
def test_where_a_request_ends(asked: GenerateRequest, token: int, generated: int, reason: str | None) -> None:
    assert finish_reason(asked, token, generated, end_tokens=(7, 8)) == reason


def test_what_would_end_a_request_is_banned_until_min_tokens() -> None:
    asked = request((1,), 5, min_tokens=2, stop_token_ids=(3,))
    assert [banned_tokens(asked, generated, (7, 8)) for generated in (0, 1, 2, 3)] == [
        (7, 8, 3),
        (7, 8, 3),
        (),
        (),
    ]
    assert banned_tokens(request((1,), 5), 0, (7, 8)) == ()
