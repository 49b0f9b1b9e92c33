"""The result cache in front of a backend: look up, join a flight, or compute and store."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

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
from .cached_statistics import ANSWERED_BY, BYPASS_REASONS, AnsweredBy, BypassReason, CachedStatistics
from .entry import CachedAnswer, fits, is_storable
from .hits import Hit
from .key import Serving, generate_key, infer_key
from .result_cache import EntryTags, ResultCache
from .second_level import SecondLevel
from .sharing import Asker, Group, Item, Request, Rival, Watcher, computing, is_whole, item_bytes, replay, to_keep


class _Opened(NamedTuple):
    outcome: CacheOutcome
    response_id: str
    created_s: int
    items: AsyncGenerator[Any, None]
    hit: Hit | None = None


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
        self._flights: dict[bytes, Group] = {}
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
        key, asker = self._asked(request)
        if (found := self._found(key, asker)) is not None:
            return InferAnswer("hit", cast(InferResult, found.answer.items[0]), found)
        outcome, _, _, items, _ = await self._miss(key, asker)
        (result,) = [item async for item in items]
        return InferAnswer(outcome, result)

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None = None) -> GenerateAnswer:
        """Answer a generation. Raises: as `Backend.generate`, now or when the chunks are read."""
        if self._bypasses(bypass):
            created_s = int(self._wall_clock())
            return GenerateAnswer("bypass", request.request_id, created_s, self._passed(request))
        return GenerateAnswer(*await self._open(request))

    def recall(self, hits: Sequence[object]) -> bool:
        """Whether requests that were answered by these hits, asked again, would be so answered: then they have
        been, and are counted. Of use to whoever kept what a request became of them.

        Never by anything that was flushed, or has expired, made room or been computed anew since; nor where the
        cache was switched off, or the model is another.
        """
        known = [hit for hit in hits if isinstance(hit, Hit) and self._is_current(hit)]
        if not known or len(known) != len(hits):
            return False
        for hit in known:
            self.cache.get(hit.key)
            self._count_hit(hit)
        return True

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
        for key, group in list(self._flights.items()):
            if model in (None, group.tags.model) and tenant in (None, group.tags.tenant):
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
        if (found := self._found(key, asker)) is not None:
            answer = found.answer
            return _Opened("hit", answer.response_id, answer.created_s, replay(answer.items), found)
        return await self._miss(key, asker)

    def _found(self, key: bytes, asker: Asker) -> Hit | None:
        """What memory has."""
        if (answer := self.cache.get(key)) is None:
            return None
        hit = Hit(key, answer, self.model, asker.tags.tenant, asker.request)
        self._count_hit(hit)
        return hit

    def _is_current(self, hit: Hit) -> bool:
        alive = self.cache.limits.max_bytes > 0 and self.cache.holds(hit.key, hit.answer)
        return alive and hit.model is self.model

    def _count_hit(self, hit: Hit) -> None:
        self.cache.hits += 1
        self._outcomes["memory"] += 1
        if self.watcher is not None:
            self.watcher.observe(hit.tenant, hit.key, hit.request)

    async def _miss(self, key: bytes, asker: Asker) -> _Opened:
        items = self._read(key, self._join(key, asker, None), asker)
        # Begins it, so that one that is closed before its first item leaves its flight all the same.
        rival: Rival = await anext(items)
        outcome, group = self._outcome(rival, asker), rival.group
        return _Opened(outcome, group.response_id, group.created_s, items)

    def _outcome(self, rival: Rival, asker: Asker) -> CacheOutcome:
        if rival.group.from_second:
            self._outcomes["second"] += 1
            return "hit"
        outcome: AnsweredBy = "miss" if rival.leader is asker else "coalesced"
        self._outcomes[outcome] += 1
        self.cache.misses += outcome == "miss"
        self.cache.coalesced += outcome == "coalesced"
        return cast(CacheOutcome, outcome)

    def _join(self, key: bytes, asker: Asker, before: Group | None) -> Rival:
        """A computation under way; a new one where there is none, or none that is urgent enough.

        Args:
            before: what the asker was told to be answered by, and is not.
        """
        group = self._flights.get(key)
        front = None if group is None else group.front()
        if group is None or front is None:
            return self._launch(key, asker, before)
        if not group.is_overtaken_by(asker):
            return front
        if not group.looked_up.is_set():
            front.leader = asker  # in time: it does not compute yet
            return front
        beside = self._fly(key, group, asker, asker.compute(asker.left_s()))
        self._superseded += 1
        return beside

    def _launch(self, key: bytes, asker: Asker, before: Group | None) -> Rival:
        """Begin a group, in place of one `before`."""
        if before is not None:
            return self._fly(key, before.renewed(), asker, asker.compute(asker.left_s()))
        group = Group(asker.request.request_id, int(self._wall_clock()), asker.tags)
        if self.second is not None:
            return self._fly(key, group, asker, self._looked_up(self.second, key, group))
        group.looked_up.set()
        return self._fly(key, group, asker, asker.compute(asker.request.timeout_s))

    def _fly(self, key: bytes, group: Group, asker: Asker, items: AsyncGenerator[Any, None]) -> Rival:
        def ended() -> None:
            if self._flights.get(key) is group:
                del self._flights[key]

        self._flights[key] = group
        return group.fly(asker, items, partial(self._store, key, group), ended)

    async def _looked_up(self, second: SecondLevel, key: bytes, group: Group) -> AsyncGenerator[Any, None]:
        """What the second level has, or what is computed instead."""
        (rival,) = group.rivals
        model, request = self.model, rival.leader.request
        try:
            found = await second.get(key, group.tags, lambda answer: fits(answer, model, request))
            group.ticket = found.ticket
            if found.answer is not None:
                group.from_second = True
                group.response_id, group.created_s = found.answer.response_id, found.answer.created_s
                group.age_s = max(0.0, self.cache.limits.ttl_s - found.remaining_s)
        finally:
            group.looked_up.set()
        items = replay(found.answer.items) if found.answer else rival.leader.compute(rival.leader.left_s())
        async with contextlib.aclosing(items):
            async for item in items:
                yield item

    def _store(self, key: bytes, group: Group, items: list[Item]) -> None:
        # One that is not the current one any more was begun before a flush.
        if self._flights.get(key) is not group:
            return
        if not (items and all(map(is_storable, items)) and is_whole(items[-1])):
            return
        answer = CachedAnswer(group.response_id, group.created_s, tuple(map(to_keep, items)))
        size_bytes = sum(map(item_bytes, items))
        self.cache.put(key, answer, size_bytes, group.tags, group.age_s)
        if self.second is not None and group.ticket is not None and not group.from_second:
            self.second.put(key, group.tags, answer, size_bytes, group.ticket)

    async def _read(self, key: bytes, rival: Rival, asker: Asker) -> AsyncGenerator[Any, None]:
        """Read a computation: itself first, as soon as it is known what it gives, and then its items.

        Where it fails and another goes on, leave out what was read: equal requests give equal items.
        """
        position, begun = 0, False
        with self._counted(key, asker) if asker.counts else contextlib.nullcontext():
            while True:
                try:
                    with rival.flight.joined():
                        if not begun:
                            await rival.group.wait_looked_up(asker.deadline)
                            begun = True
                            yield rival
                        async with contextlib.aclosing(rival.flight.read(asker.deadline, position)) as items:
                            async for item in items:
                                position += 1
                                yield item
                    return
                except Exception as error:
                    other = self._instead(key, rival.successor or rival, asker, error)
                    if other is None:
                        raise
                    rival = other

    def _instead(self, key: bytes, failed: Rival, asker: Asker, error: Exception) -> Rival | None:
        """What a reader of one that failed is to read then: a rival that runs, or, where the reason was the
        leader's own, the next computation; None: the error is for the reader."""
        if failed.leader is asker or error is not failed.flight.error or time.monotonic() >= asker.deadline:
            return None
        if (running := failed.group.front()) is not None:
            return running
        return self._join(key, asker, failed.group) if failed.failed_alone else None
