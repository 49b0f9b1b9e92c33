"""Stop strings. They are text, so they are looked for where there is a tokenizer: in the gateway, below its result
cache, so that what is cached is the answer up to the token that completes one, whole and to be replayed.

The text that is searched is the one that special tokens have no part in, decoded as a continuation of the prompt:
a first token "▁world" has its space there. Both this and what cuts the text for the caller read it with
`StopScanner`, and so agree on the token that ends it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from ..requests import Backend, GenerateRequest, InferRequest, InferResult, ModelInfo, SamplingParams, TokenChunk

# More than any character or word that the end of a prompt may be in the middle of.
CONTEXT_TOKENS = 32


class Decoder(Protocol):
    """Decodes one sequence token by token."""

    def push(self, token_ids: list[int], /) -> str:
        """The text that these tokens complete."""
        ...


class Codec(Protocol):
    """What is needed of a tokenizer."""

    def incremental(self, context: list[int], /) -> Decoder:
        """A decoder for what continues `context`."""
        ...


def prompt_context(prompt: Sequence[int]) -> list[int]:
    """What a decoder needs to know of the prompt."""
    return list(prompt[-CONTEXT_TOKENS:])


def terminators(model: ModelInfo, sampling: SamplingParams) -> frozenset[int]:
    """Tokens that end an answer; the one that does has no part in its text."""
    return frozenset((*(() if sampling.ignore_eos else model.eos_token_ids), *sampling.stop_token_ids))


def is_silent(chunk: TokenChunk, ends: frozenset[int]) -> bool:
    """Whether the chunk's last token is one that ended the answer, and so gives no text."""
    return chunk.finish_reason == "stop" and bool(chunk.token_ids) and chunk.token_ids[-1] in ends


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


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first stop string in `text` begins, and which it is; of two at one place the first in `stops`."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, key=lambda item: item[0], default=None)


class StopScanner:
    """The text of one answer while it is searched. Text that might be the beginning of a stop string is held back,
    so that nothing after one, nor any part of it, is ever given.

    Args:
        min_tokens: a stop string that is complete before so many tokens ends nothing.

    Attributes:
        matched: the stop string that ended the text; None while it goes on.
    """

    __slots__ = ("_end", "_min_tokens", "_pending", "_stops", "_tokens", "matched")

    def __init__(self, stops: tuple[str, ...], min_tokens: int = 0) -> None:
        self.matched: str | None = None
        self._stops = stops
        self._min_tokens = min_tokens
        self._pending = ""
        self._end = 0
        self._tokens = 0

    def push(self, text: str, tokens: int = 1) -> bool:
        """Takes the text that came with so many more tokens; whether it is complete now."""
        self._tokens += tokens
        self._pending += text
        if self._stops and self.matched is None and self._tokens >= self._min_tokens:
            found = first_stop(self._pending, self._stops)
            if found is not None:
                self._end, self.matched = found
        return self.matched is not None

    def take(self, complete: bool, with_stop: bool = False) -> str:
        """The text that is certain now, all of it when `complete`; with or without what stopped it."""
        if self.matched is not None:
            text, self._pending = self._pending[: self._end + (len(self.matched) if with_stop else 0)], ""
            self._end = 0
            return text
        cut = len(self._pending) - (0 if complete else held_back(self._pending, self._stops))
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text


class StoppingBackend:
    """Ends generations at their stop strings, and what computes them with it.

    Args:
        codec: None where there is no tokenizer: nothing is stopped then.
    """

    def __init__(self, backend: Backend, codec: Codec | None) -> None:
        self.backend = backend
        self._codec = codec

    @property
    def model(self) -> ModelInfo:
        """See `Backend`."""
        return self.backend.model

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Backend`."""
        return await self.backend.infer(request)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `Backend`. The chunk that completes a stop string is the last one, and ends with that token."""
        if self._codec is None or not request.sampling.stop:
            return self.backend.generate(request)
        return self._stopped(request, self._codec)

    async def _stopped(self, request: GenerateRequest, codec: Codec) -> AsyncGenerator[TokenChunk, None]:
        sampling = request.sampling
        decoder = codec.incremental(prompt_context(request.prompt_token_ids))
        scanner, silent = StopScanner(sampling.stop, sampling.min_tokens), terminators(self.model, sampling)
        for token in request.emitted:
            scanner.push(decoder.push([token]))
            scanner.take(complete=False)
        async with aclosing(self.backend.generate(request)) as chunks:
            async for chunk in chunks:
                ids = chunk.token_ids[:-1] if is_silent(chunk, silent) else chunk.token_ids
                for count, token in enumerate(ids, start=1):
                    if scanner.push(decoder.push([token])):
                        yield _ended(chunk, count)
                        return
                scanner.take(complete=False)
                yield chunk


def _ended(chunk: TokenChunk, count: int) -> TokenChunk:
    """The chunk's first `count` tokens, as the end of a generation."""
    logprobs = None if chunk.logprobs is None else chunk.logprobs[:count]
    return replace(chunk, token_ids=chunk.token_ids[:count], finish_reason="stop", logprobs=logprobs)
