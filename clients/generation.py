"""A generated text as it comes back in OpenAI's protocol: whole, or put together from the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .errors import ProtocolError, error_from_object
from .token_logprobs import TokenLogprob, prompt_logprobs, token_logprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `cached_tokens`: of the prompt's, those that were not computed, since what the model
    makes of them was there already."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AppliedMode:
    """Which preset the server applied, and what it left out of a chat for it. None: not told.

    Attributes:
        name: "accuracy", "speed" or "ultra"; None where only `truncation` was asked for.
        trimmed_tokens: of the texts of the messages left out.
    """

    name: str | None
    trimmed_messages: int | None = None
    trimmed_tokens: int | None = None
    kept_messages: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model wants called. `arguments` are JSON text, which may be wrong: a model wrote it."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """As it stands in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the tool call `index`: its first has `id` and `name`, and all their `arguments` add up."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """The next piece of a stream. Only the last has a `finish_reason`: "stop", "length" or "tool_calls".

    `text` may be empty while `token_ids` is not: a character can take several tokens.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text.

    Attributes:
        token_ids: those of `text`, as the model gave them.
        finish_reason: "stop", "length" or "tool_calls"; None only in a stream that is not finished.
        logprobs: one for each token, where they were asked for.
        cache: how the result cache answered: "hit", "miss", "coalesced" or "bypass".
        request_id: the server's name for this request.
        tool_calls: what the model wants called, in its order.
        prompt_logprobs: one for each token of the prompt, None for the first, where they were asked for; `top` of
            each are the likeliest there.
        prompt_token_ids: where the server tells them.
        mode: the preset applied, with what it left out; None where the request had none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    usage: Usage | None
    logprobs: tuple[TokenLogprob, ...] | None
    model: str
    cache: str | None
    request_id: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    mode: AppliedMode | None = None

    def as_message(self) -> dict[str, Any]:
        """This answer as a message, for the conversation to go on from."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message |= {"content": self.text or None, "tool_calls": [call.as_json() for call in self.tool_calls]}
        return message


@dataclass
class GenerationBuilder:
    """Puts a generation together: from the events of a stream, or from a whole answer as its only one."""

    cache: str | None = None
    request_id: str | None = None
    model: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    mode: AppliedMode | None = None
    _prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    _prompt_token_ids: tuple[int, ...] | None = None
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
                self.usage = _usage(usage)
            if mode := body.get("pimoe"):
                self.mode = _mode(mode)
            self._take_prompt(body)
            return self._add_choice(body["choices"][0]) if body["choices"] else None

    def _take_prompt(self, found: Mapping[str, Any]) -> None:
        """What is told of the prompt: of chats beside the choices, of completions in each."""
        if found.get("prompt_logprobs") is not None:
            self._prompt_logprobs = prompt_logprobs(found["prompt_logprobs"])
        if found.get("prompt_token_ids") is not None:
            self._prompt_token_ids = tuple(int(token) for token in found["prompt_token_ids"])

    def _add_choice(self, choice: Mapping[str, Any]) -> GenerationChunk | None:
        self._take_prompt(choice)
        said = choice.get("message") or choice.get("delta") or {}
        chunk = GenerationChunk(
            text=str(choice.get("text") or said.get("content") or ""),
            token_ids=tuple(int(token) for token in choice.get("token_ids") or ()),
            finish_reason=choice.get("finish_reason"),
            logprobs=token_logprobs(choice.get("logprobs")),
            tool_calls=_tool_calls(said.get("tool_calls") or []),
        )
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self._chunks.append(chunk)
        # The first piece of a chat may say nothing but whose turn it is.
        told = chunk.text or chunk.token_ids or chunk.finish_reason or chunk.tool_calls
        return chunk if told else None

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
            tool_calls=self._tool_calls(),
            prompt_logprobs=self._prompt_logprobs,
            prompt_token_ids=self._prompt_token_ids,
            mode=self.mode,
        )

    def _tool_calls(self) -> tuple[ToolCall, ...]:
        calls: dict[int, ToolCall] = {}
        for delta in (delta for chunk in self._chunks for delta in chunk.tool_calls):
            known = calls.get(delta.index, ToolCall("", "", ""))
            arguments = known.arguments + delta.arguments
            calls[delta.index] = ToolCall(delta.id or known.id, delta.name or known.name, arguments)
        return tuple(calls[index] for index in sorted(calls))


def _usage(found: Mapping[str, Any]) -> Usage:
    details = found.get("prompt_tokens_details") or {}
    cached = int(details.get("cached_tokens") or 0)
    return Usage(int(found["prompt_tokens"]), int(found.get("completion_tokens", 0)), cached)


def _mode(found: Mapping[str, Any]) -> AppliedMode:
    return AppliedMode(
        found.get("mode"), found.get("trimmed_messages"), found.get("trimmed_tokens"), found.get("kept_messages")
    )


def _tool_calls(found: list[Mapping[str, Any]]) -> tuple[ToolCallDelta, ...]:
    """Of a whole message, where they have no index, or of a streamed one."""
    return tuple(
        ToolCallDelta(
            int(call.get("index", place)),
            call.get("id"),
            (call.get("function") or {}).get("name"),
            str((call.get("function") or {}).get("arguments") or ""),
        )
        for place, call in enumerate(found)
    )


@contextmanager
def _reading(text: bytes) -> Iterator[None]:
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        shown = text[:200].decode("utf-8", "replace")
        raise ProtocolError(f"the server sent what is no completion: {shown!r} ({error!r})") from error
