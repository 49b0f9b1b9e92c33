"""Prompts of `/v1`: checked, turned into token ids, and measured against the context."""

from __future__ import annotations

import asyncio
from typing import Any

from ...runtime.errors import ContextLengthError, InvalidRequestError
from ...runtime.requests import ModelInfo
from .context import ApiSettings, TextCodec
from .fields import Fields, shown
from .prompt_cache import cannot_fit

Prompt = str | list[int]

# Above this, encoding would hold the event loop for milliseconds.
THREAD_FROM_CHARS = 16_384


def read_prompts(fields: Fields, model: ModelInfo, settings: ApiSettings) -> list[Prompt]:
    """The prompts of a completion: a string, token ids, or a list of either.

    Raises:
        InvalidRequestError: missing, empty, too many, or a token id out of the vocabulary.
    """
    value = fields.values.get("prompt")
    many: list[Any] = value if isinstance(value, list) and value and not _is_ids(value) else [value]
    if len(many) > settings.max_prompts:
        raise fields.wrong("prompt", f"at most {settings.max_prompts} prompts")
    for prompt in many:
        _check_prompt(prompt, fields, model)
    if len({type(prompt) for prompt in many}) > 1:
        raise fields.wrong("prompt", "all strings or all lists of token ids")
    return many


def _is_ids(value: list[Any]) -> bool:
    return isinstance(value[0], int | float)


def _check_prompt(prompt: object, fields: Fields, model: ModelInfo) -> None:
    if isinstance(prompt, str) and prompt:
        return
    if not isinstance(prompt, list) or not prompt:
        right = "a string that is not empty, a list of token ids, or a list of either"
        raise fields.wrong("prompt", right)
    if set(map(type, prompt)) != {int}:
        raise InvalidRequestError("prompt: token ids must be integers", "prompt")
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        bad = next(token for token in prompt if not 0 <= token < model.vocab_size)
        raise InvalidRequestError(
            f"prompt: token id {shown(bad)} is out of the vocabulary, 0 to {model.vocab_size - 1}", "prompt"
        )


async def encode_all(
    prompts: list[Prompt], codec: TextCodec | None, model: ModelInfo, special: bool, whole: bool = True
) -> list[list[int]]:
    """Every prompt's token ids; `special` adds the tokenizer's own (a rendered chat has them already).

    Args:
        whole: all of a prompt must fit in the context; false where it is cut afterwards, or only counted.

    Raises:
        InvalidRequestError: there is no tokenizer, or nothing is left of a prompt.
        ContextLengthError: a text is certain to be longer than the context.
    """

    def encode() -> list[list[int]]:
        return [
            _encode(prompt, _codec(codec), model, special, whole) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]

    chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await asyncio.to_thread(encode) if chars >= THREAD_FROM_CHARS else encode()


def _codec(codec: TextCodec | None) -> TextCodec:
    if codec is None:
        raise InvalidRequestError("this checkpoint has no tokenizer; give the prompt as token ids", "prompt")
    return codec


def _encode(prompt: str, codec: TextCodec, model: ModelInfo, special: bool, whole: bool) -> list[int]:
    if cannot_fit(prompt, codec, model.max_context_tokens, whole):
        raise ContextLengthError(
            f"the prompt has {len(prompt)} characters; the context has {model.max_context_tokens} tokens",
            "prompt",
        )
    ids = codec.encode(prompt, add_special_tokens=special)
    if not ids:
        raise InvalidRequestError("the prompt has no tokens", "prompt")
    return ids


def truncated(prompt: list[int], keep: int | None, wanted: int | None, model: ModelInfo) -> list[int]:
    """The end of a prompt.

    Args:
        keep: how many tokens; 0: as many as the context has room for besides `wanted`; None: all.
        wanted: how many tokens are to be generated at most, if that is said.
    """
    if keep is None:
        return prompt
    room = keep or max(1, model.max_context_tokens - (wanted or 1))
    return prompt[-room:]


def token_budget(prompt_tokens: int, wanted: int | None, default: int, model: ModelInfo) -> int:
    """How many tokens may be generated.

    Raises:
        ContextLengthError: the prompt, or the prompt and the tokens asked for, exceed the context.
    """
    left = model.max_context_tokens - prompt_tokens
    if wanted is None and left >= 1:
        return min(default, left)
    if wanted is not None and wanted <= left:
        return wanted
    asked = f"{prompt_tokens} prompt tokens" + (f" and max_tokens {wanted}" if wanted is not None else "")
    raise ContextLengthError(
        f"{asked} exceed the context of {model.max_context_tokens} tokens",
        "prompt" if wanted is None else "max_tokens",
    )
