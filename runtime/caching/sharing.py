"""What equal requests under way share: one computation, and the identity of the response that it is for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

from ..batching.classes import class_of
from ..errors import DeadlineExceededError, OverloadedError, RequestCancelledError
from ..requests import Backend, GenerateRequest, InferRequest, InferResult, TokenChunk
from .flight import Flight
from .result_cache import EntryTags

V = TypeVar("V", InferResult, TokenChunk)

Item: TypeAlias = InferResult | TokenChunk
Request: TypeAlias = InferRequest | GenerateRequest
Compute: TypeAlias = Callable[[float], AsyncGenerator[V, None]]  # within so many seconds

# Reasons to fail that are a leader's own: its time, its place in the queue.
_LEADERS_OWN = (DeadlineExceededError, OverloadedError, RequestCancelledError)

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
class Rival:
    """One of the computations of a group.

    Attributes:
        leader: whose priority and deadline it has.
        successor: the one that superseded it.
    """

    leader: Asker
    group: Group
    flight: Flight[Any] = field(init=False)
    successor: Rival | None = None

    @property
    def urgency(self) -> int:
        """The class of its priority."""
        return class_of(self.leader.request.priority)

    @property
    def failed_alone(self) -> bool:
        """Whether it failed for a reason that need not hold for its other readers."""
        return isinstance(self.flight.error, _LEADERS_OWN)


@dataclass(slots=True, eq=False)
class Group:
    """Computations of the same, each more urgent by a class than the one before; what their readers must know.

    The one that gives its first item first goes on for the readers of all, and the others end. So a computation
    that is nearly done is not lost to a more urgent request, nor that one's to its shorter time.

    Attributes:
        response_id, created_s: of the request that it was begun for, or of the stored answer that it gives.
        looked_up: set once it is known whether the second level has the answer. Only then may readers be told
            who they are answered by. Before that the first rival is the only one.
        from_second: whether it had.
        ticket: for storing the answer in the second level.
        age_s: of the stored answer.
        rivals: least urgent first. Those that failed stay, lest each request of their class fail in the same way.
    """

    response_id: str
    created_s: int
    tags: EntryTags
    ticket: bytes | None = None
    looked_up: asyncio.Event = field(default_factory=asyncio.Event)
    from_second: bool = False
    age_s: float = 0.0
    rivals: list[Rival] = field(default_factory=list)

    def renewed(self) -> Group:
        """One for when all of this one have failed; readers keep the identity that they were told."""
        again = Group(self.response_id, self.created_s, self.tags, self.ticket)
        again.looked_up.set()
        return again

    def fly(
        self,
        leader: Asker,
        items: AsyncGenerator[Any, None],
        finished: Callable[[list[Any]], None],
        ended: Callable[[], None],
    ) -> Rival:
        """Begin a rival: the first, or one that `is_overtaken_by`.

        Args:
            finished: called when it has ended whole, with all items.
            ended: called when it has ended in any way, or was given up, and no other runs.
        """
        rival = Rival(leader, self)

        def one_ended() -> None:
            # Those that nobody waited for bar no other's way.
            self.rivals = [each for each in self.rivals if not each.flight.is_abandoned]
            if self.front() is None:
                self.rivals = []  # they know their group: nothing is to wait for the garbage collector
                ended()

        rival.flight = Flight(items, lambda: self._won(rival), finished, one_ended)
        self.rivals.append(rival)
        return rival

    def front(self) -> Rival | None:
        """Of those that run the one to join: that which has begun, or the most urgent; None: none runs."""
        return next((rival for rival in reversed(self.rivals) if not rival.flight.is_done), None)

    def is_overtaken_by(self, asker: Asker) -> bool:
        """Whether that one is more urgent by a class than all, and early enough for it to matter. Classes are few,
        so that as many run at once at most."""
        front = self.front()
        early = front is not None and front.flight.is_empty
        return early and class_of(asker.request.priority) > self.rivals[-1].urgency

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

    def _won(self, winner: Rival) -> None:
        for rival in self.rivals:
            if rival is not winner and not rival.flight.is_done:
                rival.successor = winner
                rival.flight.supersede(winner.flight)


def is_whole(last: Item) -> bool:
    """Whether an answer that ends so was not cut."""
    return isinstance(last, InferResult) or last.finish_reason is not None


def item_bytes(item: Item) -> int:
    """About the memory that it takes."""
    if isinstance(item, InferResult):
        return item.output.nbytes
    alternatives = sum(1 + len(logprob.top) for logprob in item.logprobs or ())
    return _TOKEN_BYTES * max(1, len(item.token_ids)) + _LOGPROB_BYTES * alternatives


def to_keep(item: Item) -> Item:
    """The same, to be held for as long as it is stored."""
    return InferResult(item.output.owned()) if isinstance(item, InferResult) else item


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
