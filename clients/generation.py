"""Text generation over OpenAI's protocol: what may be asked for, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

from .errors import InvalidRequestError, ProtocolError, error_from_object
from .transport import HttpRequest

Message: TypeAlias = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt: TypeAlias = str | Sequence[int]
_JSON = {"Content-Type": "application/json"}


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `chat` and `stream`. One left out, or None, is the server's to choose.

    - `max_tokens`: most tokens to generate (the server's default may be OpenAI's 16); `min_tokens`: fewest.
    - `temperature`: 0 is greedy. `top_p`, `top_k` (0: all), `min_p`: what to sample from. `seed`: with equal ones,
      equal tokens.
    - `stop`: texts, and `stop_token_ids`: tokens, at which to end. `ignore_eos`: do not end at the model's own.
    - `logprobs`: how many alternatives to report for each token; 0 reports the chosen one only.
    - `priority`: 0 to 1, 1 is most urgent; or "interactive" (1), "default" (0.5), "batch" (0). `timeout_s`: for
      the whole call, retries included.
    - `cache`: False neither looks the answer up nor keeps it.
    - `extra_body`: further fields of the request body.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    logprobs: int | None
    ignore_eos: bool | None
    priority: float | str | None
    timeout_s: float | None
    cache: bool | None
    extra_body: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a generated token and of the likeliest ones, as `(text, logprob)`."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """The next piece of a stream. Only the last has a `finish_reason`: "stop" or "length".

    `text` may be empty while `token_ids` is not: a character can take several tokens.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text.

    Attributes:
        token_ids: those of `text`, as the model gave them.
        finish_reason: "stop" or "length"; None only in a stream that is not finished.
        logprobs: one for each token, where they were asked for.
        cache: how the result cache answered: "hit", "miss", "coalesced" or "bypass".
        request_id: the server's name for this request.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    usage: Usage | None
    logprobs: tuple[TokenLogprob, ...] | None
    model: str
    cache: str | None
    request_id: str | None


def generation_request(
    prompt: Prompt | Sequence[Message], model: str, options: GenerateOptions, stream: bool, remaining_s: float
) -> HttpRequest:
    """The request for `prompt`, which is a chat when it is a list of messages.

    Raises:
        InvalidRequestError: something in it is no JSON.
    """
    chat = is_chat(prompt)
    body: dict[str, Any] = {"model": model, **_prompt_fields(prompt), **_option_fields(options, chat)}
    body |= {"timeout": remaining_s, "return_token_ids": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        data = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request cannot be written as JSON: {error}") from error
    return HttpRequest("POST", "/v1/chat/completions" if chat else "/v1/completions", _JSON, (data,))


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


def _prompt_fields(prompt: Prompt | Sequence[Message]) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if is_chat(prompt):
        return {"messages": [dict(message) for message in prompt]}  # type: ignore[arg-type]
    try:
        return {"prompt": [int(token) for token in prompt]}  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"a prompt is text, token ids or messages: {error}", param="prompt") from error


def _option_fields(options: GenerateOptions, chat: bool) -> dict[str, Any]:
    fields = {name: value for name, value in options.items() if value is not None}
    fields.pop("timeout_s", None)
    extra = fields.pop("extra_body", {})
    if chat and "logprobs" in fields:
        fields |= {"top_logprobs": fields["logprobs"], "logprobs": True}
    for name in ("stop", "stop_token_ids"):
        if name in fields and not isinstance(fields[name], str):
            fields[name] = list(fields[name])  # type: ignore[call-overload]
    return {**fields, **extra}  # type: ignore[dict-item]


@dataclass
class GenerationBuilder:
    """Puts a generation together: from the events of a stream, or from a whole answer as its only one."""

    cache: str | None = None
    request_id: str | None = None
    model: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    _chunks: list[GenerationChunk] = field(default_factory=list)

    def add(self, event: bytes) -> GenerationChunk | None:
        """What the JSON text `event` adds to the generation, or None.

        Raises:
            PimoeClientError: the one that the event describes.
            ProtocolError: it is no completion.
        """
        with _reading(event):
            body = json.loads(event)
            if body.get("error"):
                raise error_from_object(body["error"])
            self.model = body.get("model", self.model)
            if usage := body.get("usage"):
                self.usage = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens", 0)))
            return self._add_choice(body["choices"][0]) if body["choices"] else None

    def _add_choice(self, choice: Mapping[str, Any]) -> GenerationChunk | None:
        said = choice.get("message") or choice.get("delta") or {}
        chunk = GenerationChunk(
            text=str(choice.get("text") or said.get("content") or ""),
            token_ids=tuple(int(token) for token in choice.get("token_ids") or ()),
            finish_reason=choice.get("finish_reason"),
            logprobs=_logprobs(choice.get("logprobs")),
        )
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self._chunks.append(chunk)
        # The first piece of a chat may say nothing but whose turn it is.
        return chunk if chunk.text or chunk.token_ids or chunk.finish_reason else None

    def build(self) -> Generation:
        """The generation so far."""
        logprobs = [chunk.logprobs for chunk in self._chunks if chunk.logprobs is not None]
        return Generation(
            text="".join(chunk.text for chunk in self._chunks),
            token_ids=tuple(token for chunk in self._chunks for token in chunk.token_ids),
            finish_reason=self.finish_reason,
            usage=self.usage,
            logprobs=tuple(item for items in logprobs for item in items) if logprobs else None,
            model=self.model,
            cache=self.cache,
            request_id=self.request_id,
        )


def _logprobs(found: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...] | None:
    """Both of OpenAI's forms: lists side by side for completions, a list of objects for chats."""
    if found is None:
        return None
    if found.get("content") is not None:
        return tuple(
            TokenLogprob(
                str(item["token"]),
                float(item["logprob"]),
                tuple((str(top["token"]), float(top["logprob"])) for top in item.get("top_logprobs") or ()),
            )
            for item in found["content"]
        )
    tokens = found.get("tokens") or ()
    tops = found.get("top_logprobs") or [{}] * len(tokens)
    return tuple(
        TokenLogprob(str(token), float(logprob), tuple((str(text), float(p)) for text, p in (top or {}).items()))
        for token, logprob, top in zip(tokens, found.get("token_logprobs") or (), tops, strict=True)
    )


@contextmanager
def _reading(text: bytes) -> Iterator[None]:
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        shown = text[:200].decode("utf-8", "replace")
        raise ProtocolError(f"the server sent what is no completion: {shown!r} ({error!r})") from error
