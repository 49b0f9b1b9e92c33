"""What a request may ask for, which tokens it must not get, and where it ends. Pure: no clock, no tensors."""

from __future__ import annotations

from ..errors import ContextLengthError, InvalidRequestError
from ..requests import FinishReason, GenerateRequest


def check_request(request: GenerateRequest, vocab_size: int, max_context_tokens: int) -> None:
    """Refuse what can never run. What one request could do to the others of its step must be found here.

    Raises:
        ContextLengthError: prompt and answer do not fit.
        InvalidRequestError: nothing to begin with or to come, or token ids that the model lacks.
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
    ):
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise InvalidRequestError(f"a token id in {name} is outside of the vocabulary of {vocab_size}", name)


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
