"""The shapes of OpenAI's answers: completions and chat completions, whole and streamed, with either form of
logprobs.

Plain maps, built as they are sent: these run once per token. What differs between the two endpoints is in two
classes with the same methods; the rest of the code does not ask which one it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ...runtime.requests import FinishReason, TokenLogprob
from .assembly import Piece
from .context import TextCodec

# JSON has no -Infinity, which is the logprob of a token that sampling ruled out.
_LEAST_LOGPROB = -9999.0
_REPLACEMENT = "\ufffd"


@dataclass(slots=True)
class Choice:
    """All of one choice, collected for an answer that is not streamed."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """Appends the next piece."""
        self.text.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.offsets.extend(piece.offsets)
        self.finish_reason = piece.finish_reason

    def whole(self) -> Piece:
        """The choice as one piece."""
        logprobs, offsets = tuple(self.logprobs), tuple(self.offsets)
        return Piece("".join(self.text), tuple(self.token_ids), logprobs, offsets, self.finish_reason)


class Format(Protocol):
    """One endpoint's shapes. `logprobs`: whether they were asked for."""

    id_prefix: str
    object: str
    chunk_object: str

    def choice(self, index: int, piece: Piece, logprobs: bool) -> dict[str, Any]:
        """A whole choice."""
        ...

    def delta(self, index: int, piece: Piece, logprobs: bool, first: bool) -> dict[str, Any]:
        """A choice in a streamed chunk; `first`: its first."""
        ...


class TokenNames:
    """Tokens as text, for logprobs; without a codec as `token_id:17`."""

    __slots__ = ("_codec",)

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._codec is None else self._codec.token_text(token_id)


class CompletionFormat:
    """`/v1/completions`."""

    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, codec: TextCodec | None) -> None:
        self._name = TokenNames(codec)

    def choice(self, index: int, piece: Piece, logprobs: bool) -> dict[str, Any]:
        """A whole choice."""
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(piece) if logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def delta(self, index: int, piece: Piece, logprobs: bool, first: bool) -> dict[str, Any]:
        """A choice in a chunk: here the same."""
        return self.choice(index, piece, logprobs)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        return {
            "tokens": [self._name(item.token_id) for item in piece.logprobs],
            "token_logprobs": [_finite(item.logprob) for item in piece.logprobs],
            "top_logprobs": [self._top(item) for item in piece.logprobs],
            "text_offset": list(piece.offsets),
        }

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        # Two tokens may read alike (parts of characters do): the likelier one, which comes first, keeps the
        # name.
        for token_id, logprob in (*item.top, (item.token_id, item.logprob)):
            top.setdefault(self._name(token_id), _finite(logprob))
        return top


class ChatFormat:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, codec: TextCodec | None) -> None:
        self._name = TokenNames(codec)

    def choice(self, index: int, piece: Piece, logprobs: bool) -> dict[str, Any]:
        """A whole choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece) if logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def delta(self, index: int, piece: Piece, logprobs: bool, first: bool) -> dict[str, Any]:
        """A choice in a chunk; the first one says whose turn it is."""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if first or piece.text:
            delta["content"] = piece.text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece) if logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        content = [
            {
                **self._entry(item.token_id, item.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in item.top],
            }
            for item in piece.logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._name(token_id)
        # A part of a character has bytes that its text does not tell.
        data = None if _REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
