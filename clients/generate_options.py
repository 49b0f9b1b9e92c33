"""What may be asked of a generation, and the request that asks for it, in OpenAI's protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from .errors import InvalidRequestError
from .transport import HttpRequest

Message: TypeAlias = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt: TypeAlias = str | Sequence[int]
Mode: TypeAlias = Literal["accuracy", "speed", "ultra", "none"]

_JSON = {"Content-Type": "application/json"}
_CHAT_ONLY = ("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "truncation")


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `chat` and `stream`. One left out, or None, is the server's to choose.

    What is generated:

    - `mode`: a preset of the server, "accuracy", "speed" or "ultra"; whatever else is given here wins over it.
      "none": no preset, where the server has one by default. `truncation`: "disabled" keeps all messages of a
      chat in every mode; "auto" drops the oldest where the context is too small for all.
    - `max_tokens`: most tokens to generate (the server's default may be OpenAI's 16); `min_tokens`: fewest.
    - `temperature`: 0 is greedy. `top_p`, `top_k` (0: all), `min_p`: what to sample from. `seed`: with equal ones,
      equal tokens.
    - `repetition_penalty` (1: none), `presence_penalty`, `frequency_penalty` (0: none). `logit_bias`: what to add
      to the logits of token ids.
    - `stop`: texts, and `stop_token_ids`: tokens, at which to end. `ignore_eos`: do not end at the model's own.
    - `response_format`: what the answer must match, as {"type": "json_schema", "json_schema": {"name": ...,
      "schema": ...}}, or {"type": "json_object"}.
    - of chats, `tools` and `tool_choice` in OpenAI's shape; `parallel_tool_calls`: False for one call at most;
      `chat_template_kwargs`: more variables of the chat template.

    What is told of it:

    - `logprobs`: how many alternatives to report for each token; 0 reports the chosen one only.
      `prompt_logprobs`: the same for the prompt's tokens, not in streams.
    - `return_token_ids`: False leaves token ids out, for a smaller answer.

    How it is served:

    - `priority`: 0 to 1, 1 is most urgent; or "interactive" (1), "default" (0.5), "batch" (0). `timeout_s`: for
      the whole call, retries included.
    - `cache`: False neither looks the answer up nor keeps it. `cache_salt`: nothing is shared between requests
      that differ in it, neither answers nor what was computed of their prompts.
    - `extra_body`: further fields of the request body.
    """

    mode: Mode | None
    truncation: Literal["auto", "disabled"] | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    response_format: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool | None
    priority: float | str | None
    timeout_s: float | None
    cache: bool | None
    cache_salt: str | None
    extra_body: Mapping[str, Any] | None


def generation_request(
    prompt: Prompt | Sequence[Message], model: str, options: GenerateOptions, stream: bool, remaining_s: float
) -> HttpRequest:
    """The request for `prompt`, which is a chat when it is a list of messages.

    Raises:
        InvalidRequestError: something in it is no JSON.
    """
    chat = is_chat(prompt)
    body: dict[str, Any] = {"model": model, **prompt_fields(prompt), **_option_fields(options, chat)}
    body = {"return_token_ids": True, **body, "timeout": remaining_s}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json_request("/v1/chat/completions" if chat else "/v1/completions", body)


def json_request(path: str, body: Mapping[str, Any]) -> HttpRequest:
    """A POST of JSON.

    Raises:
        InvalidRequestError: something in `body` is no JSON.
    """
    try:
        data = json.dumps(body, allow_nan=False, separators=(",", ":"), default=_as_plain).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request cannot be written as JSON: {error}") from error
    return HttpRequest("POST", path, _JSON, (data,))


def _as_plain(value: object) -> Any:
    """Mappings and sequences that are no dict and no list, as the annotations allow them."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def check_options(options: GenerateOptions) -> None:
    """The type checker knows the names of the options; at run time a mistyped one must not pass silently either.

    Raises:
        TypeError: an option of that name does not exist.
    """
    known = GenerateOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; there are {', '.join(known)}")


def is_chat(prompt: Prompt | Sequence[Message]) -> bool:
    """Whether `prompt` is messages rather than text or token ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def prompt_fields(prompt: Prompt | Sequence[Message]) -> dict[str, Any]:
    """The field of a request that holds the prompt.

    Raises:
        InvalidRequestError: it is neither text nor token ids nor messages.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if is_chat(prompt):
        return {"messages": [dict(message) for message in prompt]}  # type: ignore[arg-type]
    try:
        return {"prompt": [int(token) for token in prompt]}  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"a prompt is text, token ids or messages: {error}", param="prompt") from error


def _option_fields(options: GenerateOptions, chat: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    fields.pop("timeout_s", None)
    extra = fields.pop("extra_body", {})
    for name in () if chat else _CHAT_ONLY:
        if name in fields:
            raise InvalidRequestError(f"{name} is for chats; a prompt that is no messages has none", param=name)
    if chat and "logprobs" in fields:
        fields |= {"top_logprobs": fields["logprobs"], "logprobs": True}
    for name in ("stop", "stop_token_ids"):
        if name in fields and not isinstance(fields[name], str):
            fields[name] = list(fields[name])
    return {**fields, **extra}
