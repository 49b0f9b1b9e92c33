"""The result cache in front of a backend: look up, join a flight, or compute and store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from ..errors import DeadlineExceededError, OverloadedError, RequestCancelledError
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

Compute: TypeAlias = Callable[[float], AsyncGenerator[V, None]]  # within so many seconds

_TOKEN_BYTES = 96  # of a stored token: its chunk, tuple and numbers
_LOGPROB_BYTES = 160


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """What an entry holds: the items as computed, and the identity of the response that they were first given in,
    so that a cached answer is the computed one byte for byte."""

    response_id: str
    created_s: int
    items: tuple[InferResult | TokenChunk, ...]


class _Shared(NamedTuple):
    """A flight, and the identity of the response it was begun for."""

    response_id: str
    created_s: int
    flight: Flight[Any]


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
        self._flights: dict[bytes, _Shared] = {}

    @property
    def model(self) -> ModelInfo:
        """The model behind the cache."""
        return self.backend.model

    async def infer(self, request: InferRequest, use_cache: bool = True) -> InferAnswer:
        """Answer a tensor request. Raises: as `Backend.infer`."""
        if not (use_cache and self.cache.limits.max_bytes):
            self.cache.bypassed += 1
            return InferAnswer("bypass", await self.backend.infer(request))

        async def compute(timeout_s: float) -> AsyncGenerator[InferResult, None]:
            yield await self.backend.infer(replace(request, timeout_s=timeout_s))

        key = infer_key(self.model, request, self.tenant)
        outcome, _, _, items = await self._open(key, request.request_id, request.timeout_s, compute)
        (result,) = [item async for item in items]
        return InferAnswer(outcome, result)

    async def generate(self, request: GenerateRequest, use_cache: bool = True) -> GenerateAnswer:
        """Answer a generation. Raises: as `Backend.generate`, now or when the chunks are read."""
        if not (use_cache and self.cache.limits.max_bytes):
            self.cache.bypassed += 1
            created_s = int(self._wall_clock())
            return GenerateAnswer("bypass", request.request_id, created_s, self.backend.generate(request))

        def compute(timeout_s: float) -> AsyncGenerator[TokenChunk, None]:
            return self.backend.generate(replace(request, timeout_s=timeout_s))

        key = generate_key(self.model, request, self.tenant)
        return GenerateAnswer(*await self._open(key, request.request_id, request.timeout_s, compute))

    async def _open(
        self, key: bytes, request_id: str, timeout_s: float, compute: Compute[V]
    ) -> tuple[CacheOutcome, str, int, AsyncGenerator[V, None]]:
        outcome: CacheOutcome = "coalesced"
        deadline = time.monotonic() + timeout_s
        if (found := self.cache.get(key)) is not None:
            self.cache.hits += 1
            return "hit", found.response_id, found.created_s, _replay(found.items)
        if (shared := self._flights.get(key)) is not None:
            self.cache.coalesced += 1
        else:
            outcome = "miss"
            self.cache.misses += 1
            shared = self._launch(key, request_id, int(self._wall_clock()), compute(timeout_s))
        items = self._read(key, shared, outcome == "miss", deadline, compute)
        await anext(items)  # begins it: one that is closed before its first item leaves its flight all the same
        return outcome, shared.response_id, shared.created_s, items

    def _launch(self, key: bytes, response_id: str, created_s: int, items: AsyncGenerator[V, None]) -> _Shared:
        def finished(items: list[V]) -> None:
            if items and all(map(_is_storable, items)) and _is_whole(items[-1]):
                answer = CachedAnswer(response_id, created_s, tuple(items))
                self.cache.put(key, answer, sum(map(_item_bytes, items)))

        def ended() -> None:
            if self._flights.get(key) is shared:
                del self._flights[key]

        shared: _Shared = _Shared(response_id, created_s, Flight(items, finished, ended))
        self._flights[key] = shared
        return shared

    async def _read(
        self, key: bytes, shared: _Shared, leads: bool, deadline: float, compute: Compute[V]
    ) -> AsyncGenerator[V, None]:
        """Read a flight, after one None. When another's fails for a reason of its leader's own (its time, its
        place in the queue), join the next or launch one, and leave out what was read: equal requests give equal
        items."""
        position, begun = 0, False
        while True:
            try:
                with shared.flight.joined():
                    if not begun:
                        begun = True
                        yield cast(V, None)
                    async with contextlib.aclosing(shared.flight.read(deadline, position)) as items:
                        async for item in items:
                            position += 1
                            yield item
                return
            except (DeadlineExceededError, OverloadedError, RequestCancelledError) as error:
                if leads or error is not shared.flight.error or time.monotonic() >= deadline:
                    raise
            if (current := self._flights.get(key)) is not None:
                shared = current
            else:
                leads = True
                items = compute(deadline - time.monotonic())
                shared = self._launch(key, shared.response_id, shared.created_s, items)


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
