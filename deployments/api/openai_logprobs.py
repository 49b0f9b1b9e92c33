"""Logprobs in the shapes of OpenAI's two endpoints and of vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.requests import TokenLogprob
from .assembly import Piece
from .context import TextCodec

# JSON has no -Infinity, which is the logprob of a token that sampling ruled out.
_LEAST_LOGPROB = -9999.0
_REPLACEMENT = "\ufffd"


class TokenNames:
    """Tokens as text; without a codec, or where `as_ids`, as `token_id:17`."""

    __slots__ = ("_codec",)

    def __init__(self, codec: TextCodec | None, as_ids: bool = False) -> None:
        self._codec = None if as_ids else codec

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._codec is None else self._codec.token_text(token_id)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that goes in front of its answer. `offsets`: characters of its text before each token."""

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]


def echo_of(prompt: str | None, token_ids: tuple[int, ...], codec: TextCodec | None) -> Echo:
    """The echo of a prompt; `prompt`: its text, where it came as one."""
    if codec is None:
        return Echo("", token_ids, (0,) * len(token_ids))
    decoder, offsets, length = codec.incremental([]), [], 0
    for token in token_ids:
        offsets.append(length)
        length += len(decoder.push([token]))
    return Echo(codec.decode(list(token_ids)) if prompt is None else prompt, token_ids, tuple(offsets))


def completion_logprobs(names: TokenNames, piece: Piece, echo: Echo | None, starts_at: int) -> dict[str, Any]:
    """The older form, as lists.

    Args:
        echo: a prompt whose tokens go in front.
        starts_at: characters before the answer's text.
    """
    prompt = _of_prompt(piece, echo) if echo is not None else []
    items = [*prompt, *((item.token_id, item) for item in piece.logprobs)]
    offsets = (*(() if echo is None else echo.offsets), *(starts_at + offset for offset in piece.offsets))
    return {
        "tokens": [names(token) for token, _ in items],
        "token_logprobs": [None if item is None else _finite(item.logprob) for _, item in items],
        "top_logprobs": [None if item is None else _top(names, item) for _, item in items],
        "text_offset": list(offsets),
    }


def _of_prompt(piece: Piece, echo: Echo) -> Sequence[tuple[int, TokenLogprob | None]]:
    found = piece.prompt_logprobs or (None,) * len(echo.token_ids)
    return list(zip(echo.token_ids, found, strict=False))


def _top(names: TokenNames, item: TokenLogprob) -> dict[str, float]:
    top: dict[str, float] = {}
    # Two tokens may read alike (parts of characters do): the likelier one, which comes first, keeps the name.
    for token_id, logprob in (*item.top, (item.token_id, item.logprob)):
        top.setdefault(names(token_id), _finite(logprob))
    return top


def chat_logprobs(names: TokenNames, piece: Piece) -> dict[str, Any]:
    """The newer form, an object for each token."""
    content = [
        {
            **_entry(names, item.token_id, item.logprob),
            "top_logprobs": [_entry(names, token_id, logprob) for token_id, logprob in item.top],
        }
        for item in piece.logprobs
    ]
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    text = names(token_id)
    # A part of a character has bytes that its text does not tell.
    data = None if _REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": data}


def prompt_logprobs(names: TokenNames, piece: Piece, most: int) -> list[dict[str, Any] | None] | None:
    """vLLM's form, for each token of the prompt a map of token ids, and null for the first.

    Args:
        most: how many alternatives besides the token itself.
    """
    if piece.prompt_logprobs is None:
        return None
    return [None if item is None else _ranked(names, item, most) for item in piece.prompt_logprobs]


def _ranked(names: TokenNames, item: TokenLogprob, most: int) -> dict[str, Any]:
    entries = {str(item.token_id): _rank(names, item.token_id, item.logprob, item.rank)}
    for rank, (token_id, logprob) in enumerate(item.top[:most], start=1):
        entries.setdefault(str(token_id), _rank(names, token_id, logprob, rank))
    return entries


def _rank(names: TokenNames, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": names(token_id)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
