"""The shapes of OpenAI's answers: completions and chat completions, whole and streamed.

Plain maps, built as they are sent: these run once per token. What differs between the two endpoints is in two
classes with the same methods; the rest of the code does not ask which one it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ...runtime.requests import TokenLogprob
from .assembly import Piece
from .openai_logprobs import Echo, TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from .openai_tools import Tools
from .tool_formats import Parser, Part


@dataclass(slots=True)
class Choice:
    """All of one choice, collected for an answer that is not streamed."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    first: Piece | None = None
    last: Piece | None = None

    def add(self, piece: Piece) -> None:
        """Appends the next piece."""
        self.text.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.offsets.extend(piece.offsets)
        self.first = self.first or piece
        self.last = piece

    def whole(self) -> Piece:
        """The choice as one piece."""
        first, last = self.first or Piece("", ()), self.last or Piece("", ())
        return replace(
            first,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            offsets=tuple(self.offsets),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )


@dataclass(frozen=True, slots=True)
class Telling:
    """What answers tell besides their text.

    Attributes:
        logprobs: whether they were asked for.
        prompt_logprobs: how many alternatives for each token of the prompt; None: not asked for.
        token_ids: those of the answer.
        prompt_token_ids: those of the prompt.
        prompts: token ids of each prompt.
        n: choices of each prompt.
    """

    names: TokenNames
    logprobs: bool
    prompt_logprobs: int | None
    token_ids: bool
    prompt_token_ids: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int


class Format(Protocol):
    """One endpoint's shapes."""

    id_prefix: str
    object: str
    chunk_object: str

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        ...

    def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any] | None:
        """A choice in a streamed chunk; `first`: its first; None: the piece has nothing to tell yet."""
        ...

    def around(self, piece: Piece) -> dict[str, Any]:
        """Fields of the whole answer, or of its first chunk, that are of no choice; `piece`: its first."""
        ...


class CompletionFormat:
    """`/v1/completions`.

    Args:
        echoes: of each prompt, where it is asked for.
    """

    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, telling: Telling, echoes: Sequence[Echo] = ()) -> None:
        self._telling = telling
        self._echoes = echoes

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        return self._choice(index, piece, first=True)

    def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any] | None:
        """A choice in a chunk: here the same."""
        tells = piece.text or piece.finish_reason or self._telling.token_ids or self._telling.logprobs
        return self._choice(index, piece, first) if first or tells else None

    def around(self, piece: Piece) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _choice(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        telling = self._telling
        prompt = index // telling.n
        echo = self._echoes[prompt] if self._echoes else None
        ahead = echo if first else None
        choice: dict[str, Any] = {"index": index, "text": piece.text if ahead is None else ahead.text + piece.text}
        starts_at = 0 if echo is None else len(echo.text)
        logprobs = completion_logprobs(telling.names, piece, ahead, starts_at) if telling.logprobs else None
        choice |= {"logprobs": logprobs, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if telling.token_ids:
            choice["token_ids"] = piece.token_ids
        if telling.prompt_token_ids and first:
            choice["prompt_token_ids"] = telling.prompts[prompt]
        if telling.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(telling.names, piece, telling.prompt_logprobs)
        return choice


@dataclass(slots=True)
class _Reader:
    """The answer of one choice as parts, and whether it called."""

    parser: Parser | None
    only_one: bool
    called: bool = False

    def parts(self, piece: Piece) -> list[Part]:
        if self.parser is None:
            return [Part(content=piece.text)]
        parts = self.parser.push(piece.text)
        if piece.finish_reason is not None:
            parts += self.parser.finish()
        kept = [part for part in parts if not (self.only_one and part.call)]
        self.called = self.called or any(part.call is not None for part in kept)
        return kept

    def finish_reason(self, piece: Piece) -> str | None:
        return "tool_calls" if self.called and piece.finish_reason == "stop" else piece.finish_reason


class ChatFormat:
    """`/v1/chat/completions`.

    Args:
        answer: what the ids of tool calls are made of.
        reasoning: whether it is told, where the model's format sets it apart.
    """

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, telling: Telling, tools: Tools, answer: str, reasoning: bool = True) -> None:
        self._telling = telling
        self._tools = tools
        self._answer = answer
        self._reasoning = reasoning
        self._readers: dict[int, _Reader] = {}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        reader = self._reader()
        parts = reader.parts(piece)
        calls = self._calls(index, parts)
        content = "".join(part.content for part in parts)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
        message["refusal"] = None
        if reasoning := self._thought(parts):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
        return {"index": index, "message": message, **self._told(reader, piece)}

    def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any] | None:
        """A choice in a chunk; the first one says whose turn it is."""
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._reader()
        parts = reader.parts(piece)
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        content = "".join(part.content for part in parts)
        if content or first:
            # Until it is known to be text, a tool call's is null.
            delta["content"] = content if content or reader.parser is None else None
        if reasoning := self._thought(parts):
            delta["reasoning_content"] = reasoning
        if calls := self._calls(index, parts):
            delta["tool_calls"] = calls
        if not (delta or piece.finish_reason or self._telling.token_ids or self._telling.logprobs):
            return None
        return {"index": index, "delta": delta, **self._told(reader, piece)}

    def around(self, piece: Piece) -> dict[str, Any]:
        """What is told of the prompt."""
        telling, found = self._telling, dict[str, Any]()
        if telling.prompt_token_ids:
            found["prompt_token_ids"] = telling.prompts[0]
        if telling.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(telling.names, piece, telling.prompt_logprobs)
        return found

    def _reader(self) -> _Reader:
        return _Reader(self._tools.parser(), not self._tools.known.parallel)

    def _told(self, reader: _Reader, piece: Piece) -> dict[str, Any]:
        telling = self._telling
        told: dict[str, Any] = {
            "logprobs": chat_logprobs(telling.names, piece) if telling.logprobs else None,
            "finish_reason": reader.finish_reason(piece),
            "stop_reason": piece.stop_reason,
        }
        if telling.token_ids:
            told["token_ids"] = piece.token_ids
        return told

    def _thought(self, parts: list[Part]) -> str:
        return "".join(part.reasoning for part in parts) if self._reasoning else ""

    def _calls(self, index: int, parts: list[Part]) -> list[dict[str, Any]]:
        """What the parts say of calls, one entry for each call."""
        calls: dict[int, dict[str, Any]] = {}
        for part in parts:
            if part.call is None:
                continue
            entry = calls.setdefault(part.call, {"index": part.call, "function": {"arguments": ""}})
            if part.name is not None:
                entry["id"] = self._tools.call_id(self._answer, index, part.call)
                entry["type"] = "function"
                entry["function"] = {"name": part.name, "arguments": ""}
            entry["function"]["arguments"] += part.arguments
        return list(calls.values())


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object. `cached_tokens`: of the prompt, those that were not computed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
