"""What equal requests under way share: one computation, and the identity of the response that it is for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

from ..batching.classes import class_of
from ..errors import DeadlineExceededError
from ..requests import Backend, GenerateRequest, InferRequest, InferResult, TokenChunk
from .flight import Flight
from .result_cache import EntryTags

V = TypeVar("V", InferResult, TokenChunk)

Item: TypeAlias = InferResult | TokenChunk
Request: TypeAlias = InferRequest | GenerateRequest
Compute: TypeAlias = Callable[[float], AsyncGenerator[V, None]]  # within so many seconds

_TOKEN_BYTES = 96  # of a stored token: its chunk, tuple and numbers
_LOGPROB_BYTES = 160


@dataclass(frozen=True, slots=True, eq=False)
class Asker:
    """One request that the cache may answer.

    Attributes:
        deadline: on `time.monotonic()`.
        compute: asks the backend for it.
        counts: somebody waits for it.
    """

    request: Request
    deadline: float
    compute: Compute[Any]
    tags: EntryTags
    counts: bool = True

    def left_s(self) -> float:
        """Seconds until the deadline; 0 after it."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(slots=True, eq=False)
class Shared:
    """A flight and what its readers must know.

    Attributes:
        response_id, created_s: of the request that it was begun for, or of the stored answer that it gives.
        leader: whose priority and deadline the computation has.
        looked_up: set once it is known whether the second level has the answer. Only then may readers be told
            who they are answered by.
        from_second: whether it had.
        ticket: for storing the answer in the second level.
        age_s: of the stored answer.
        successor: what supersedes it.
    """

    response_id: str
    created_s: int
    leader: Asker
    flight: Flight[Any] = field(init=False)
    looked_up: asyncio.Event = field(default_factory=asyncio.Event)
    from_second: bool = False
    ticket: bytes | None = None
    age_s: float = 0.0
    successor: Shared | None = None

    def may_be_overtaken_by(self, asker: Asker) -> bool:
        """Whether that one is more urgent by a class, and early enough for it to matter. Classes are few, so that
        a computation is begun anew a few times at most."""
        urgency, leaders = class_of(asker.request.priority), class_of(self.leader.request.priority)
        return self.flight.is_empty and urgency > leaders

    async def wait_looked_up(self, deadline: float) -> None:
        """Until `looked_up`.

        Raises:
            DeadlineExceededError: not by then.
        """
        if self.looked_up.is_set():
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self.looked_up.wait()
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out") from None


def is_whole(last: Item) -> bool:
    """Whether an answer that ends so was not cut."""
    return isinstance(last, InferResult) or last.finish_reason is not None


def item_bytes(item: Item) -> int:
    """About the memory that it takes."""
    if isinstance(item, InferResult):
        return item.output.nbytes
    alternatives = sum(1 + len(logprob.top) for logprob in item.logprobs or ())
    return _TOKEN_BYTES * max(1, len(item.token_ids)) + _LOGPROB_BYTES * alternatives


class Watcher(Protocol):
    """Is told what comes and goes; `prefetch.Prefetcher` is one. Neither raises."""

    def observe(self, tenant: str, key: bytes, request: Request, /) -> None:
        """A request that the cache may answer has come, and is counted by `is_idle` if it has to wait."""
        ...

    def load_changed(self) -> None:
        """What `is_idle` says may have changed."""
        ...


def computing(backend: Backend, request: Request) -> Compute[Any]:
    """How a request is computed, once it is known how much time that may take."""

    async def infer(request: InferRequest, timeout_s: float) -> AsyncGenerator[InferResult, None]:
        yield await backend.infer(replace(request, timeout_s=timeout_s))

    def generate(request: GenerateRequest, timeout_s: float) -> AsyncGenerator[TokenChunk, None]:
        return backend.generate(replace(request, timeout_s=timeout_s))

    return partial(infer, request) if isinstance(request, InferRequest) else partial(generate, request)


async def replay(items: tuple[Any, ...]) -> AsyncGenerator[Any, None]:
    """A stored answer, as if it were computed."""
    for item in items:
        yield item
