"""From token chunks to text: incremental decoding, stop strings, and the logprobs that belong to the text.

Stop strings are the gateway's business because they are text: one may begin in the middle of a token. Text
that might be the beginning of one is held back, so that nothing after a stop string, nor any part of it, is
ever sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from ...runtime.errors import PimoeError
from ...runtime.requests import FinishReason, TokenChunk, TokenLogprob
from .context import TextCodec

Chunks = AsyncGenerator[TokenChunk, None]

_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of one choice. `offsets` are the characters of text before each token of `logprobs`.

    Tokens are reported with the piece in which they came, even while their text is still held back: over all
    pieces `token_ids` are the tokens generated, up to and including the one that completed a stop string.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class TextRules:
    """What ends a text. `terminators` are token ids whose text is not part of it when they end the
    generation."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    terminators: frozenset[int] = frozenset()
    logprobs: bool = False


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        start = max(0, len(text) - len(stop) + 1)
        while (start := text.find(stop[0], start)) >= 0:
            if stop.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start += 1
    return longest


def first_stop(text: str, stops: tuple[str, ...]) -> int:
    """Where the first stop string in `text` begins; -1 where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)


class Assembler:
    """The text of one choice. Without a codec there is no text, only tokens.

    Args:
        context: the last tokens of the prompt, where the text is to be its continuation.
    """

    __slots__ = ("_decoded_chars", "_decoder", "_one_by_one", "_pending", "_rules", "_stopped", "_tokens")

    def __init__(self, codec: TextCodec | None, rules: TextRules, context: tuple[int, ...] = ()) -> None:
        self._decoder = None if codec is None else codec.incremental(list(context))
        self._rules = rules
        # Only these need to know which token brought which text.
        self._one_by_one = bool(rules.stop) or rules.logprobs
        self._pending = ""
        self._decoded_chars = 0
        self._tokens = 0
        self._stopped = False

    def push(self, chunk: TokenChunk) -> Piece:
        """Takes the next tokens. The piece has a `finish_reason` when the choice is complete."""
        ids = chunk.token_ids
        silent = chunk.finish_reason == "stop" and bool(ids) and ids[-1] in self._rules.terminators
        taken, offsets = self._take(ids[:-1] if silent else ids)
        if silent and not self._stopped:
            taken += 1
            offsets.append(self._decoded_chars)
        if chunk.finish_reason is not None and not self._stopped and self._decoder is not None:
            self._append(self._decoder.finish())
        reason: FinishReason | None = "stop" if self._stopped else chunk.finish_reason
        logprobs = chunk.logprobs[:taken] if self._rules.logprobs and chunk.logprobs else ()
        return Piece(self._release(reason is not None), ids[:taken], logprobs, tuple(offsets), reason)

    def _take(self, ids: tuple[int, ...]) -> tuple[int, list[int]]:
        """How many tokens were used, and the characters of text before each."""
        offsets: list[int] = []
        if not self._one_by_one:
            self._append(self._decode(list(ids)))
            return len(ids), offsets
        for count, token in enumerate(ids, start=1):
            offsets.append(self._decoded_chars)
            self._tokens += 1
            self._append(self._decode([token]))
            if self._stopped:
                return count, offsets
        return len(ids), offsets

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.push(ids) if self._decoder is not None and ids else ""

    def _append(self, text: str) -> None:
        self._decoded_chars += len(text)
        self._pending += text
        if self._rules.stop and self._tokens >= self._rules.min_tokens:
            at = first_stop(self._pending, self._rules.stop)
            if at >= 0:
                self._pending = self._pending[:at]
                self._stopped = True

    def _release(self, complete: bool) -> str:
        keep = 0 if complete else held_back(self._pending, self._rules.stop)
        cut = len(self._pending) - keep
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text


async def close(chunks: Chunks) -> None:
    """Ends a generation that may still be running; once ended, does nothing."""
    # The request's own deadline may be what brought us here: it bounds nothing any more.
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            await chunks.aclose()


async def pieces(chunks: Chunks, assembler: Assembler) -> AsyncGenerator[Piece, None]:
    """One choice, piece by piece; the generation is closed at the end, at a stop string and when this is
    closed.

    Raises:
        PimoeError: the generation ended without a finish reason, so that its end is missing.
    """
    try:
        async for chunk in chunks:
            piece = assembler.push(chunk)
            if chunk.finish_reason is not None:
                # To its very end: whoever keeps the answer, as the cache does, must see that it is whole.
                await anext(chunks, None)
            yield piece
            if piece.finish_reason is not None:
                return
        raise PimoeError("a generation ended without a finish reason")
    finally:
        await close(chunks)
