"""Where a request's chunks go on their way from the engine's steps to its reader."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from ..errors import PimoeError
from ..histogram import Histogram
from ..requests import FinishReason, GenerateRequest, TokenChunk, TokenLogprob
from .sampling_state import SamplingState
from .scheduler import Generation


class TokenTimes(NamedTuple):
    """Seconds from arrival to the first token, and from each token of an answer to the next."""

    first: Histogram
    between: Histogram


class Stream:
    """One request in the engine. Bounded by the request's `max_tokens`.

    Args:
        times: where its times are counted.
        arrived: on the engine's clock.

    Attributes:
        state: what sampling remembers of it.
        generation: once it runs; before, where it was tried and did not fit, its `candidate`.
        chunks: for the reader; an error ends them.
    """

    def __init__(self, request: GenerateRequest, state: SamplingState, times: TokenTimes, arrived: float) -> None:
        self.request, self.state = request, state
        self._times, self._last = times, arrived
        self.generation: Generation | None = None
        self.candidate: Generation | None = None
        self.chunks: asyncio.Queue[TokenChunk | PimoeError] = asyncio.Queue()
        self._begun = False

    def put(self, token: int, reason: FinishReason | None, logprob: TokenLogprob | None, now: float) -> None:
        """The next token, chosen at `now`."""
        first = {} if self._begun else self._told_once()
        (self._times.between if self._begun else self._times.first).add(now - self._last)
        self._begun, self._last = True, now
        logprobs = None if logprob is None else (logprob,)
        self.chunks.put_nowait(TokenChunk((token,), reason, logprobs, **first))

    def fail(self, error: PimoeError) -> None:
        """The end."""
        self.chunks.put_nowait(error)

    def _told_once(self) -> dict[str, Any]:
        """What only the first chunk tells."""
        generation = self.generation
        assert generation is not None
        told: dict[str, Any] = {"cached_tokens": generation.cached_tokens or 0}
        if self.request.sampling.prompt_logprobs is not None:
            told["prompt_logprobs"] = tuple(generation.prompt_logprobs)
        return told
