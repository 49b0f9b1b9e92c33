"""The result cache in front of a backend: look up, join a flight, or compute and store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import DeadlineExceededError, OverloadedError, PimoeError, RequestCancelledError
from ..numerics import all_finite
from ..requests import (
    Backend,
    CacheOutcome,
    GenerateAnswer,
    GenerateRequest,
    InferAnswer,
    InferRequest,
    InferResult,
    ModelInfo,
    TokenChunk,
)
from .flight import Flight
from .key import generate_key, infer_key
from .result_cache import ResultCache

V = TypeVar("V", InferResult, TokenChunk)

_TOKEN_BYTES = 96  # of a stored token: its chunk, tuple and numbers
_LOGPROB_BYTES = 160


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """What an entry holds: the items as computed, and the identity of the response that they were first given in,
    so that a cached answer is the computed one byte for byte."""

    response_id: str
    created_s: int
    items: tuple[InferResult | TokenChunk, ...]


class CachedBackend:
    """Looks up before computing; equal requests under way share one computation.

    Args:
        tenant: salts every key; entries are never shared between tenants.
        wall_clock: Unix seconds, for `created` in responses.
    """

    def __init__(
        self,
        backend: Backend,
        cache: ResultCache[CachedAnswer],
        tenant: str = "",
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.backend = backend
        self.cache = cache
        self.tenant = tenant
        self._wall_clock = wall_clock
        self._flights: dict[bytes, tuple[str, int, Flight[Any]]] = {}

    @property
    def model(self) -> ModelInfo:
        """The model behind the cache."""
        return self.backend.model

    async def infer(self, request: InferRequest, use_cache: bool = True) -> InferAnswer:
        """Answer a tensor request. Raises: as `Backend.infer`."""
        if not (use_cache and self.cache.limits.max_bytes):
            self.cache.bypassed += 1
            return InferAnswer("bypass", await self.backend.infer(request))

        async def compute() -> AsyncGenerator[InferResult, None]:
            yield await self.backend.infer(request)

        key = infer_key(self.model, request, self.tenant)
        outcome, _, _, items = self._open(key, request.request_id, request.timeout_s, compute)
        (result,) = [item async for item in items]
        return InferAnswer(outcome, result)

    async def generate(self, request: GenerateRequest, use_cache: bool = True) -> GenerateAnswer:
        """Answer a generation; errors surface when the chunks are read. Raises: as `Backend.generate`."""
        if not (use_cache and self.cache.limits.max_bytes):
            self.cache.bypassed += 1
            created_s = int(self._wall_clock())
            return GenerateAnswer("bypass", request.request_id, created_s, self.backend.generate(request))
        key = generate_key(self.model, request, self.tenant)
        return GenerateAnswer(
            *self._open(key, request.request_id, request.timeout_s, lambda: self.backend.generate(request))
        )

    def _open(
        self, key: bytes, request_id: str, timeout_s: float, compute: Callable[[], AsyncGenerator[V, None]]
    ) -> tuple[CacheOutcome, str, int, AsyncGenerator[V, None]]:
        if (found := self.cache.get(key)) is not None:
            self.cache.hits += 1
            return "hit", found.response_id, found.created_s, _replay(found.items)
        deadline = time.monotonic() + timeout_s
        if (open_flight := self._flights.get(key)) is not None:
            self.cache.coalesced += 1
            response_id, created_s, flight = open_flight
            follower = self._follow(key, flight, deadline, compute)
            return "coalesced", response_id, created_s, follower
        self.cache.misses += 1
        created_s = int(self._wall_clock())
        leader = self._launch(key, request_id, created_s, compute)
        return "miss", request_id, created_s, leader.read(deadline)

    def _launch(
        self, key: bytes, request_id: str, created_s: int, compute: Callable[[], AsyncGenerator[V, None]]
    ) -> Flight[V]:
        def finished(items: list[V]) -> None:
            if items and all(map(_is_storable, items)) and _is_whole(items[-1]):
                answer = CachedAnswer(request_id, created_s, tuple(items))
                self.cache.put(key, answer, sum(map(_item_bytes, items)))

        flight: Flight[V] = Flight(compute(), finished, lambda: self._land(key, flight))
        self._flights[key] = (request_id, created_s, flight)
        return flight

    def _land(self, key: bytes, flight: Flight[V]) -> None:
        if (current := self._flights.get(key)) is not None and current[2] is flight:
            del self._flights[key]

    async def _follow(
        self, key: bytes, flight: Flight[V], deadline: float, compute: Callable[[], AsyncGenerator[V, None]]
    ) -> AsyncGenerator[V, None]:
        """Read another's flight. When it fails for a reason of its leader's own (its time, its place in the
        queue), compute alone, and leave out what was read already: equal requests give equal items."""
        position = 0
        try:
            async with contextlib.aclosing(flight.read(deadline)) as items:
                async for item in items:
                    position += 1
                    yield item
            return
        except (DeadlineExceededError, OverloadedError, RequestCancelledError):
            if time.monotonic() >= deadline:
                raise
        except PimoeError:
            if not flight.cancelled:
                raise
        async with contextlib.aclosing(compute()) as items:
            async for item in items:
                position -= 1
                if position < 0:
                    yield item


async def _replay(items: tuple[Any, ...]) -> AsyncGenerator[Any, None]:
    for item in items:
        yield item


def _is_storable(item: InferResult | TokenChunk) -> bool:
    return not isinstance(item, InferResult) or all_finite(item.output)


def _is_whole(last: InferResult | TokenChunk) -> bool:
    return isinstance(last, InferResult) or last.finish_reason is not None


def _item_bytes(item: InferResult | TokenChunk) -> int:
    if isinstance(item, InferResult):
        return item.output.nbytes
    alternatives = sum(1 + len(logprob.top) for logprob in item.logprobs or ())
    return _TOKEN_BYTES * max(1, len(item.token_ids)) + _LOGPROB_BYTES * alternatives
