"""A backend for cache tests: computes only as far as the test lets it, and counts what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
from pimoe.runtime.errors import PimoeError
from pimoe.runtime.requests import (
    GenerateRequest,
    InferRequest,
    InferResult,
    ModelInfo,
    SamplingParams,
    TensorData,
    TokenChunk,
)

MODEL = ModelInfo("m", "decoder", "olmoe", "float32", 4, 4, 2, (0, 1), 256, 512, (1, 2), "digest")


class Backend:
    """Generates the tokens 0, 1, 2 ... up to `max_tokens`; `allow` says how many steps may be taken in all."""

    def __init__(self) -> None:
        self.model = MODEL
        self.generations: list[GenerateRequest] = []
        self.inferences: list[InferRequest] = []
        self.closed = 0
        self.failures: list[Exception] = []
        self.cut = False  # end without a finish reason
        self.poison = False
        self._steps = asyncio.Semaphore(0)

    def allow(self, steps: int = 1000) -> None:
        """Let so many more steps be taken."""
        for _ in range(steps):
            self._steps.release()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `Backend`."""
        self.generations.append(request)
        try:
            for token in range(request.sampling.max_tokens):
                await self._step()
                last = token == request.sampling.max_tokens - 1
                yield TokenChunk((token,), "length" if last and not self.cut else None)
        finally:
            self.closed += 1

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Backend`: doubles."""
        self.inferences.append(request)
        try:
            await self._step()
        finally:
            self.closed += 1
        values = 2 * np.frombuffer(request.hidden_states.data, np.float32)
        if self.poison:
            values[-1] = np.nan
        return InferResult(TensorData("float32", request.hidden_states.shape, values.tobytes()))

    async def _step(self) -> None:
        await self._steps.acquire()
        if self.failures:
            raise self.failures.pop(0)


def generation(
    name: str = "g", max_tokens: int = 4, timeout_s: float = 20.0, **options: object
) -> GenerateRequest:
    """A request; two with the same `max_tokens` are equal to the cache."""
    return GenerateRequest(
        name,
        (7, 8),
        SamplingParams(max_tokens=max_tokens, temperature=0),
        timeout_s=timeout_s,
        **options,  # type: ignore[arg-type]
    )


def inference(name: str = "i", value: float = 1.0, timeout_s: float = 20.0) -> InferRequest:
    """A request; two with the same `value` are equal to the cache."""
    data = TensorData("float32", (2, 4), np.full((2, 4), value, np.float32).tobytes())
    return InferRequest(name, data, timeout_s=timeout_s)


def tokens(chunks: list[TokenChunk]) -> list[int]:
    """The token ids of all chunks."""
    return [token for chunk in chunks for token in chunk.token_ids]


class Refused(PimoeError):
    """An error that is the request's own."""
