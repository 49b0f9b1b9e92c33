"""From token chunks to text: incremental decoding, the cut at a stop string, and the logprobs that belong to the
text.

Where a generation ends at a stop string is decided below the result cache (`runtime/generation/stopping.py`); here
its text is cut there. Both read the text with a `StopScanner`, and so agree; where nothing below stops it, this
closes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from ...runtime.errors import PimoeError
from ...runtime.generation.stopping import StopScanner, is_silent
from ...runtime.requests import FinishReason, TokenChunk, TokenLogprob
from .context import TextCodec

Chunks = AsyncGenerator[TokenChunk, None]

_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of one choice. `offsets` are the characters of text before each token of `logprobs`.

    Tokens are reported with the piece in which they came, even while their text is still held back: over all
    pieces `token_ids` are the tokens generated, up to and including the one that completed a stop string.

    Attributes:
        stop_reason: with a `finish_reason` of "stop", the stop string or stop token that it was; None for the
            model's own end.
        prompt_logprobs, cached_tokens: of the first piece, as in `TokenChunk`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextRules:
    """What ends a text, and what is part of it.

    Attributes:
        terminators: token ids whose text is not part of it when they end the generation.
        ends: those of them that are the model's own, which are no `stop_reason`.
        with_stop: a stop string, or the text of a stop token, is part of the text.
        visible: special tokens that have a text nevertheless: their names.
        anew: the text begins anew, rather than to continue the prompt's: without the space that decoding strips
            from the beginning of a text.
    """

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    terminators: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()
    logprobs: bool = False
    with_stop: bool = False
    visible: frozenset[int] = frozenset()
    anew: bool = False


class Assembler:
    """The text of one choice. Without a codec there is no text, only tokens.

    Args:
        context: the last tokens of the prompt.
    """

    __slots__ = (
        *("_codec", "_decoded_chars", "_decoder", "_drop_space", "_marks", "_one_by_one", "_released", "_rules"),
        *("_scanned_chars", "_scanner"),
    )

    def __init__(self, codec: TextCodec | None, rules: TextRules, context: tuple[int, ...] = ()) -> None:
        self._codec = codec
        self._decoder = None if codec is None else codec.incremental(list(context))
        self._rules = rules
        self._scanner = StopScanner(rules.stop, rules.min_tokens)
        # Only these need to know which token brought which text.
        self._one_by_one = bool(rules.stop or rules.visible) or rules.logprobs
        self._drop_space: bool | None = None if rules.anew and codec is not None else False
        self._marks: deque[tuple[int, str]] = deque()  # names of special tokens, and the characters before each
        self._scanned_chars = self._released = 0
        self._decoded_chars = 0

    def push(self, chunk: TokenChunk) -> Piece:
        """Takes the next tokens. The piece has a `finish_reason` when the choice is complete."""
        ids = chunk.token_ids
        silent = is_silent(chunk, self._rules.terminators)
        taken, offsets = self._take(ids[:-1] if silent and not self._shows_end(ids[-1]) else ids)
        if taken < len(ids) and self._scanner.matched is None:
            taken += 1
            offsets.append(self._decoded_chars)
        if chunk.finish_reason is not None and self._scanner.matched is None and self._decoder is not None:
            self._append(self._decoder.finish(), 0)
        stopped = self._scanner.matched
        reason: FinishReason | None = chunk.finish_reason if stopped is None else "stop"
        ended_by = ids[-1] if silent and ids[-1] not in self._rules.ends else None
        return Piece(
            text=self._release(reason is not None),
            token_ids=ids[:taken],
            logprobs=chunk.logprobs[:taken] if self._rules.logprobs and chunk.logprobs else (),
            offsets=tuple(offsets),
            finish_reason=reason,
            stop_reason=ended_by if stopped is None else stopped,
            prompt_logprobs=chunk.prompt_logprobs,
            cached_tokens=chunk.cached_tokens,
        )

    def _shows_end(self, token: int) -> bool:
        return self._rules.with_stop and token not in self._rules.ends

    def _take(self, ids: tuple[int, ...]) -> tuple[int, list[int]]:
        """How many tokens were used, and the characters of text before each."""
        offsets: list[int] = []
        if not self._one_by_one and self._drop_space is not None:
            self._append(self._decode(list(ids)), len(ids))
            return len(ids), offsets
        for count, token in enumerate(ids, start=1):
            offsets.append(self._decoded_chars)
            text = self._decode([token])
            if self._drop_space is None and text:
                self._drop_space = self._is_stripped(text, token)
            if token in self._rules.visible:
                self._mark(token)
            self._append(text, 1)
            if self._scanner.matched is not None:
                return count, offsets
        return len(ids), offsets

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.push(ids) if self._decoder is not None and ids else ""

    def _is_stripped(self, text: str, token: int) -> bool:
        """Whether the first text of all begins with a space that it would not have at the beginning of a text."""
        return self._codec is not None and text[0] == " " and self._codec.decode([token]) == text[1:]

    def _mark(self, token: int) -> None:
        name = "" if self._codec is None else self._codec.token_text(token)
        self._marks.append((self._scanned_chars, name))
        self._decoded_chars += len(name)

    def _append(self, text: str, tokens: int) -> None:
        self._decoded_chars += len(text)
        self._scanned_chars += len(text)
        self._scanner.push(text, tokens)

    def _release(self, complete: bool) -> str:
        """The text that is certain, with the names of special tokens where they came."""
        text = self._scanner.take(complete, self._rules.with_stop)
        start = 1 if text and self._released == 0 and self._drop_space else 0
        parts: list[str] = []
        while self._marks and self._marks[0][0] - self._released <= len(text):
            at, name = self._marks.popleft()
            cut = max(start, at - self._released)
            parts += text[start:cut], name
            start = cut
        self._released += len(text)
        return "".join((*parts, text[start:])) if parts else text[start:]


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
