"""The result cache in front of a backend: look up, join a flight, or compute and store."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, NamedTuple, cast

from ..errors import DeadlineExceededError, OverloadedError, RequestCancelledError
from ..requests import (
    Backend,
    CacheOutcome,
    GenerateAnswer,
    GenerateRequest,
    InferAnswer,
    InferRequest,
    ModelInfo,
    TokenChunk,
)
from .cached_statistics import ANSWERED_BY, BYPASS_REASONS, AnsweredBy, BypassReason, CachedStatistics
from .entry import CachedAnswer, fits, is_storable
from .flight import Flight, Superseded
from .key import Serving, generate_key, infer_key
from .result_cache import EntryTags, ResultCache
from .second_level import SecondLevel
from .sharing import Asker, Item, Request, Shared, Watcher, computing, is_whole, item_bytes, replay


class _Opened(NamedTuple):
    outcome: CacheOutcome
    response_id: str
    created_s: int
    items: AsyncGenerator[Any, None]


class CachedBackend:
    """Looks up before computing; equal requests under way share one computation.

    Args:
        second: a second level to ask where `cache` has nothing; closed by whoever made it.
        serving: what else of the deployment decides answers; goes into every key.
        share_tenants: give what was computed for one tenant to others.
        wall_clock: Unix seconds, for `created` in responses.

    Attributes:
        watcher: None, or set before the first request.
    """

    def __init__(
        self,
        backend: Backend,
        cache: ResultCache[CachedAnswer],
        second: SecondLevel | None = None,
        serving: Serving | None = None,
        share_tenants: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.backend = backend
        self.cache = cache
        self.second = second
        self.serving = serving or Serving()
        self.share_tenants = share_tenants
        self.watcher: Watcher | None = None
        self._wall_clock = wall_clock
        self._waiting = 0  # requests that are not answered yet, those of `warm` left out
        self._flights: dict[bytes, Shared] = {}
        self._outcomes: Counter[str] = Counter(dict.fromkeys(ANSWERED_BY, 0))
        self._bypassed: Counter[str] = Counter(dict.fromkeys(BYPASS_REASONS, 0))
        self._superseded = 0

    @property
    def model(self) -> ModelInfo:
        """The model behind the cache."""
        return self.backend.model

    async def infer(self, request: InferRequest, bypass: BypassReason | None = None) -> InferAnswer:
        """Answer a tensor request. Raises: as `Backend.infer`."""
        if self._bypasses(bypass):
            with self._counted():
                return InferAnswer("bypass", await self.backend.infer(request))
        outcome, _, _, items = await self._open(request)
        (result,) = [item async for item in items]
        return InferAnswer(outcome, result)

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None = None) -> GenerateAnswer:
        """Answer a generation. Raises: as `Backend.generate`, now or when the chunks are read."""
        if self._bypasses(bypass):
            created_s = int(self._wall_clock())
            return GenerateAnswer("bypass", request.request_id, created_s, self._passed(request))
        return GenerateAnswer(*await self._open(request))

    async def warm(self, request: Request) -> None:
        """Compute and store an answer that nobody has asked for yet; in no count of requests.

        Raises: as `Backend.infer` and `generate`.
        """
        key, asker = self._asked(request, counts=False)
        async with contextlib.aclosing(self._read(key, self._join(key, asker, None), asker)) as items:
            async for _ in items:
                pass

    def is_idle(self) -> bool:
        """Whether every request has its answer."""
        return self._waiting == 0

    def flush(self, model: str | None = None, tenant: str | None = None) -> int:
        """Forget the answers of a model, of a tenant, or of both (None: of any), in memory; how many there were.

        What is being computed is given to those who wait for it, and neither stored nor given to who comes later.
        """
        for key, shared in list(self._flights.items()):
            if model in (None, shared.leader.tags.model) and tenant in (None, shared.leader.tags.tenant):
                del self._flights[key]
        if self.second is not None:
            self.second.forget(model, tenant)
        return self.cache.flush(model, tenant)

    def statistics(self) -> CachedStatistics:
        """See `CachedStatistics`."""
        return CachedStatistics(
            memory=self.cache.statistics(),
            second=None if self.second is None else self.second.statistics(),
            outcomes=dict(self._outcomes),
            bypass_reasons=dict(self._bypassed),
            superseded=self._superseded,
        )

    def _bypasses(self, reason: BypassReason | None) -> bool:
        if not self.cache.limits.max_bytes:
            reason = reason or "disabled"
        if reason is None:
            return False
        self.cache.bypassed += 1
        self._outcomes["bypass"] += 1
        self._bypassed[reason] += 1
        return True

    @contextlib.contextmanager
    def _counted(self, key: bytes | None = None, asker: Asker | None = None) -> Iterator[None]:
        """As waiting, and the watcher is told."""
        self._waiting += 1
        if key is not None and asker is not None:
            self._observe(key, asker)
        elif self.watcher is not None:
            self.watcher.load_changed()
        try:
            yield
        finally:
            self._waiting -= 1
            if self.watcher is not None:
                self.watcher.load_changed()

    def _observe(self, key: bytes, asker: Asker) -> None:
        if self.watcher is not None:
            self.watcher.observe(asker.tags.tenant, key, asker.request)

    async def _passed(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        with self._counted():
            async with contextlib.aclosing(self.backend.generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def _asked(self, request: Request, counts: bool = True) -> tuple[bytes, Asker]:
        model, serving = self.model, self.serving
        tags = EntryTags(model.name, "" if self.share_tenants else request.tenant)
        deadline = time.monotonic() + request.timeout_s
        make: Callable[..., bytes] = infer_key if isinstance(request, InferRequest) else generate_key
        key = make(model, request, tags.tenant, serving)
        return key, Asker(request, deadline, computing(self.backend, request), tags, counts)

    async def _open(self, request: Request) -> _Opened:
        key, asker = self._asked(request)
        if (found := self.cache.get(key)) is not None:
            self.cache.hits += 1
            self._outcomes["memory"] += 1
            self._observe(key, asker)
            return _Opened("hit", found.response_id, found.created_s, replay(found.items))
        items = self._read(key, self._join(key, asker, None), asker)
        # Begins it, so that one that is closed before its first item leaves its flight all the same.
        shared = await anext(items)
        return _Opened(self._outcome(shared, asker), shared.response_id, shared.created_s, items)

    def _outcome(self, shared: Shared, asker: Asker) -> CacheOutcome:
        if shared.from_second:
            self._outcomes["second"] += 1
            return "hit"
        outcome: AnsweredBy = "miss" if shared.leader is asker else "coalesced"
        self._outcomes[outcome] += 1
        self.cache.misses += outcome == "miss"
        self.cache.coalesced += outcome == "coalesced"
        return cast(CacheOutcome, outcome)

    def _join(self, key: bytes, asker: Asker, before: Shared | None) -> Shared:
        """The flight under way; a new one where there is none, or none that is urgent enough.

        Args:
            before: what the asker was told to be answered by, and is not.
        """
        shared = self._flights.get(key)
        if shared is None:
            return self._launch(key, asker, before)
        if not shared.may_be_overtaken_by(asker):
            return shared
        if not shared.looked_up.is_set():
            shared.leader = asker  # in time: it does not compute yet
            return shared
        self._superseded += 1
        shared.successor = self._launch(key, asker, shared)
        shared.flight.supersede()
        return shared.successor

    def _launch(self, key: bytes, asker: Asker, before: Shared | None) -> Shared:
        """Begin a flight, in place of one `before`, whose readers keep the identity that they were told."""
        if before is None:
            shared = Shared(asker.request.request_id, int(self._wall_clock()), asker)
        else:
            shared = Shared(before.response_id, before.created_s, asker, ticket=before.ticket)

        def ended() -> None:
            if self._flights.get(key) is shared:
                del self._flights[key]

        if before is None and self.second is not None:
            items = self._looked_up(self.second, key, shared)
        else:
            shared.looked_up.set()
            items = asker.compute(asker.request.timeout_s if before is None else asker.left_s())
        shared.flight = Flight(items, lambda items: self._store(key, shared, items), ended)
        self._flights[key] = shared
        return shared

    async def _looked_up(self, second: SecondLevel, key: bytes, shared: Shared) -> AsyncGenerator[Any, None]:
        """What the second level has, or what is computed instead."""
        model, request = self.model, shared.leader.request
        try:
            found = await second.get(key, shared.leader.tags, lambda answer: fits(answer, model, request))
            shared.ticket = found.ticket
            if found.answer is not None:
                shared.from_second = True
                shared.response_id, shared.created_s = found.answer.response_id, found.answer.created_s
                shared.age_s = max(0.0, self.cache.limits.ttl_s - found.remaining_s)
        finally:
            shared.looked_up.set()
        items = replay(found.answer.items) if found.answer else shared.leader.compute(shared.leader.left_s())
        async with contextlib.aclosing(items):
            async for item in items:
                yield item

    def _store(self, key: bytes, shared: Shared, items: list[Item]) -> None:
        # One that is not the current one any more was begun before a flush.
        if self._flights.get(key) is not shared:
            return
        if not (items and all(map(is_storable, items)) and is_whole(items[-1])):
            return
        answer = CachedAnswer(shared.response_id, shared.created_s, tuple(items))
        size_bytes, tags = sum(map(item_bytes, items)), shared.leader.tags
        self.cache.put(key, answer, size_bytes, tags, shared.age_s)
        if self.second is not None and shared.ticket is not None and not shared.from_second:
            self.second.put(key, tags, answer, size_bytes, shared.ticket)

    async def _read(self, key: bytes, shared: Shared, asker: Asker) -> AsyncGenerator[Any, None]:
        """Read a flight: itself first, as soon as it is known what it gives, and then its items.

        When another's fails for a reason of its leader's own (its time, its place in the queue), join the next or
        launch one, and leave out what was read: equal requests give equal items.
        """
        position, begun = 0, False
        with self._counted(key, asker) if asker.counts else contextlib.nullcontext():
            while True:
                try:
                    with shared.flight.joined():
                        if not begun:
                            await shared.wait_looked_up(asker.deadline)
                            begun = True
                            yield shared
                        async with contextlib.aclosing(shared.flight.read(asker.deadline, position)) as items:
                            async for item in items:
                                position += 1
                                yield item
                    return
                except Superseded:
                    shared = cast(Shared, shared.successor)
                except (DeadlineExceededError, OverloadedError, RequestCancelledError) as error:
                    others = shared.leader is not asker and error is shared.flight.error
                    if not others or time.monotonic() >= asker.deadline:
                        raise
                    shared = self._join(key, asker, shared)
