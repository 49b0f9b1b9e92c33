"""What a request may ask for and where it ends, as pure functions; the engine's tests see them at work."""

from __future__ import annotations

import pytest
from engines import request
from pimoe.runtime.errors import ContextLengthError, InvalidRequestError
from pimoe.runtime.generation.rules import banned_tokens, check_request, finish_reason
from pimoe.runtime.requests import GenerateRequest


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
