"""What a request may ask for, which tokens it must not get, and where it ends. Pure: no clock, no tensors."""

from __future__ import annotations

import math
from typing import get_args

from ..errors import ContextLengthError, InvalidRequestError
from ..requests import FinishReason, GenerateRequest, GrammarKind, SamplingParams

MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 256
MAX_STOP_TOKEN_IDS = 1024

# (field, least, most) of numbers; what is no number is in no range.
_RANGES = (
    ("temperature", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 10.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_LOGPROBS = (("logprobs", MAX_LOGPROBS), ("prompt_logprobs", MAX_LOGPROBS))
_POSITIVE = ("top_p", "repetition_penalty")


def check_request(request: GenerateRequest, vocab_size: int, max_context_tokens: int) -> None:
    """Refuse what can never run. What one request could do to the others of its step must be found here.

    Raises:
        ContextLengthError: prompt and answer do not fit.
        InvalidRequestError: nothing to begin with or to come, token ids that the model lacks, or sampling
            parameters out of their ranges.
    """
    sampling = request.sampling
    prompt, wanted = len(request.prompt_token_ids), sampling.max_tokens
    if prompt < 1 or wanted < 1:
        raise InvalidRequestError("a generation needs at least one prompt token and max_tokens of at least 1")
    if prompt + wanted > max_context_tokens:
        raise ContextLengthError(
            f"the prompt's {prompt} tokens and max_tokens {wanted} exceed the context of "
            f"{max_context_tokens} tokens",
            "max_tokens",
        )
    if len(request.emitted) > wanted:
        raise InvalidRequestError(f"{len(request.emitted)} tokens were emitted of at most {wanted}", "emitted")
    for name, tokens in (
        ("prompt", request.prompt_token_ids),
        ("emitted", request.emitted),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(token for token, _ in sampling.logit_bias)),
    ):
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise InvalidRequestError(f"a token id in {name} is outside of the vocabulary of {vocab_size}", name)
    check_sampling(sampling)


def check_sampling(sampling: SamplingParams) -> None:
    """Refuse values out of their ranges; token ids are for `check_request`, which knows the vocabulary.

    Raises:
        InvalidRequestError: names the field, the value and the range.
    """
    for name, least, most in _RANGES:
        value = getattr(sampling, name)
        if not (least <= value <= most and math.isfinite(value)) or (value <= 0 and name in _POSITIVE):
            bound = "finite" if math.isinf(most) else f"at most {most:g}"
            above = "above" if name in _POSITIVE else "at least"
            raise InvalidRequestError(f"{name} is {value}; it must be {above} {least:g} and {bound}", name)
    for name, most in (("top_k", math.inf), ("min_tokens", math.inf), *_LOGPROBS):
        value = getattr(sampling, name)
        if value is not None and not 0 <= value <= most:
            bound = "" if math.isinf(most) else f" and at most {most}"
            raise InvalidRequestError(f"{name} is {value}; it must be at least 0{bound}", name)
    if (count := len(sampling.stop_token_ids)) > MAX_STOP_TOKEN_IDS:
        message = f"stop_token_ids has {count} entries; at most {MAX_STOP_TOKEN_IDS} are allowed"
        raise InvalidRequestError(message, "stop_token_ids")
    _check_logit_bias(sampling.logit_bias)
    _check_grammar(sampling)


def _check_logit_bias(entries: tuple[tuple[int, float], ...]) -> None:
    if len(entries) > MAX_LOGIT_BIAS:
        message = f"logit_bias has {len(entries)} entries; at most {MAX_LOGIT_BIAS} are allowed"
        raise InvalidRequestError(message, "logit_bias")
    for token, bias in entries:
        if not -100 <= bias <= 100:
            message = f"logit_bias of token {token} is {bias}; it must be from -100 to 100"
            raise InvalidRequestError(message, "logit_bias")
    if len({token for token, _ in entries}) < len(entries):
        raise InvalidRequestError("logit_bias names a token twice", "logit_bias")


def _check_grammar(sampling: SamplingParams) -> None:
    kind, kinds = sampling.grammar_kind, get_args(GrammarKind)
    if kind not in kinds:
        raise InvalidRequestError(f"grammar_kind is {kind!r}; it must be one of {kinds}", "grammar_kind")
    if sampling.grammar and kind in ("", "json_object"):
        raise InvalidRequestError(f"grammar must be empty with grammar_kind {kind!r}", "grammar")
    if not sampling.grammar and kind not in ("", "json_object"):
        raise InvalidRequestError(f"grammar is empty; grammar_kind {kind!r} needs one", "grammar")


def finish_reason(
    request: GenerateRequest, token: int, generated: int, end_tokens: tuple[int, ...]
) -> FinishReason | None:
    """Why a request ends with `token`, the last of `generated`; None when it goes on."""
    sampling = request.sampling
    if token in sampling.stop_token_ids or (token in end_tokens and not sampling.ignore_eos):
        return "stop"
    return "length" if generated >= sampling.max_tokens else None


def banned_tokens(request: GenerateRequest, generated: int, end_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """What a request must not get next: nothing may end it before `min_tokens`."""
    if generated >= request.sampling.min_tokens:
        return ()
    return (*end_tokens, *request.sampling.stop_token_ids)
