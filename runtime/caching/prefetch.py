"""Answers that will probably be asked for next, computed while nothing else is to do. Off unless switched on.

`sequences` learns what follows what; here is when to act on it: one request at a time, only while idle, within a
budget, at the lowest priority, and given up at once when somebody asks for something.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from .prefetch_limits import Budget, PrefetchLimits
from .sequences import Request, SequenceRecorder

__all__ = ["PrefetchLimits", "PrefetchStatistics", "Prefetcher", "SequenceRecorder"]

_MAX_CANDIDATES = 64

_log = logging.getLogger(__name__)


class PrefetchStatistics(NamedTuple):
    """Known and left now; counts since start.

    Attributes:
        known, request_bytes: requests that are known, and their bytes.
        recorded: requests seen.
        predicted: requests expected that were not stored.
        warmed: computed to the end.
        useful: asked for while they were computed, or soon after.
        wasted: computed and not asked for within the horizon.
        cancelled: given up because something else was to do.
        failed: ended by errors.
        budget_left: computations that may still begin in this minute.
    """

    known: int
    request_bytes: int
    recorded: int
    predicted: int
    warmed: int
    useful: int
    wasted: int
    cancelled: int
    failed: int
    budget_left: int


class _Candidate(NamedTuple):
    request: Request
    confidence: float
    until_s: float


@dataclass(slots=True)
class _Warming:
    """What is being computed, and whether somebody has asked for it since."""

    key: bytes
    task: asyncio.Task[None]
    wanted: bool = False


class Prefetcher:
    """Watches requests and computes ahead. Runs on one event loop; `start` and `close` it.

    Args:
        warm: computes a request and has its answer stored, as if it had been asked for; cancelled when in the way.
        idle: whether there is nothing else to do. A computation of `warm` must not count.
        is_cached: whether an answer is stored.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        limits: PrefetchLimits,
        warm: Callable[[Request], Awaitable[object]],
        idle: Callable[[], bool],
        is_cached: Callable[[bytes], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._warm, self._idle, self._is_cached, self._clock = warm, idle, is_cached, clock
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._warming: _Warming | None = None
        self._budget = Budget()
        self._recorded = self._predicted = self._warmed = self._useful = 0
        self._wasted = self._cancelled = self._failed = 0
        self._forget()

    @property
    def limits(self) -> PrefetchLimits:
        """May be set while serving. What was learned is forgotten, since it was learned under others."""
        return self._limits

    @limits.setter
    def limits(self, limits: PrefetchLimits) -> None:
        self._limits = limits
        self._forget()
        self.load_changed()

    def start(self) -> None:
        """Begin to compute ahead; on the loop that requests come on."""
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Give up what is being computed, and end."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self._runner = None

    def observe(self, tenant: str, key: bytes, request: Request) -> None:
        """A request comes, after it has been counted among what is to do. Never raises."""
        if not self._limits.enabled:
            return
        try:
            self._observe(tenant, key, request)
        except Exception:
            self._failed += 1
            _log.exception("a request was not recorded for prefetching")

    def load_changed(self) -> None:
        """Something else began or ended: look whether it is idle. Never raises."""
        # What somebody has asked for meanwhile is no speculation any more: they share it.
        if self._warming is not None and not self._warming.wanted and not self._is_free():
            self._warming.task.cancel()
        self._wake.set()

    def statistics(self) -> PrefetchStatistics:
        """See `PrefetchStatistics`."""
        self._write_off()
        return PrefetchStatistics(
            known=len(self._recorder),
            request_bytes=self._recorder.request_bytes,
            recorded=self._recorded,
            predicted=self._predicted,
            warmed=self._warmed,
            useful=self._useful,
            wasted=self._wasted,
            cancelled=self._cancelled,
            failed=self._failed,
            budget_left=self._budget.left(self._limits, self._clock()) if self._limits.enabled else 0,
        )

    def _forget(self) -> None:
        limits = self._limits
        self._recorder = SequenceRecorder(limits.max_nodes, limits.max_request_bytes, limits.horizon_s)
        self._candidates: OrderedDict[bytes, _Candidate] = OrderedDict()
        self._awaited: OrderedDict[bytes, float] = OrderedDict()  # computed, and until when useful

    def _observe(self, tenant: str, key: bytes, request: Request) -> None:
        limits, now_s = self._limits, self._clock()
        self._recorded += 1
        self._write_off()
        self._candidates.pop(key, None)
        self._useful += self._awaited.pop(key, None) is not None
        if self._warming is not None and self._warming.key == key:
            self._useful += not self._warming.wanted
            self._warming.wanted = True
        for found in self._recorder.predict(tenant, key, limits.min_confidence, limits.min_occurrences):
            if not self._is_held(found.key):
                self._expect(found.key, _Candidate(found.request, found.confidence, now_s + limits.horizon_s))
        self._recorder.record(tenant, key, request, now_s)
        self.load_changed()

    def _expect(self, key: bytes, candidate: _Candidate) -> None:
        self._predicted += key not in self._candidates
        self._candidates[key] = candidate
        self._candidates.move_to_end(key)
        if len(self._candidates) > _MAX_CANDIDATES:
            self._candidates.popitem(last=False)

    def _write_off(self) -> None:
        """Count as wasted what was not asked for in time."""
        now_s = self._clock()
        while self._awaited and next(iter(self._awaited.values())) <= now_s:
            self._awaited.popitem(last=False)
            self._wasted += 1

    def _is_free(self) -> bool:
        return self._limits.enabled and self._ask(self._idle, False)

    def _is_held(self, key: bytes) -> bool:
        return self._ask(lambda: self._is_cached(key), True)

    def _ask(self, question: Callable[[], bool], otherwise: bool) -> bool:
        """An answer; one that keeps prefetching still when there is none."""
        try:
            return question()
        except Exception:
            self._failed += 1
            _log.exception("whether to prefetch could not be told")
            return otherwise

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            wait_s = float("inf")
            if (key := self._choose()) is not None:
                wait_s = self._budget.wait_s(self._limits, self._clock())
            if key is not None and wait_s <= 0:
                await self._compute(key, self._candidates.pop(key))
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if wait_s == float("inf") else wait_s):
                    await self._wake.wait()

    def _choose(self) -> bytes | None:
        """The surest candidate, if it is time for any."""
        now_s = self._clock()
        for key, candidate in list(self._candidates.items()):
            if candidate.until_s <= now_s or self._is_held(key):
                del self._candidates[key]
        if not self._candidates or not self._is_free():
            return None
        return max(self._candidates, key=lambda key: self._candidates[key].confidence)

    async def _compute(self, key: bytes, candidate: _Candidate) -> None:
        began_s = self._clock()
        self._budget.began(began_s)
        warming = self._warming = _Warming(key, asyncio.create_task(self._call(candidate.request)))
        try:
            await asyncio.wait({warming.task})
        finally:
            warming.task.cancel()
            await asyncio.wait({warming.task})
            self._warming = None
            self._budget.spent(self._limits, began_s, self._clock())
            self._conclude(warming, candidate)

    async def _call(self, request: Request) -> None:
        """As a request of its own: least urgent, and of no use after the horizon."""
        name = f"prefetch-{secrets.token_hex(8)}"
        await self._warm(replace(request, request_id=name, priority=0.0, timeout_s=self._limits.horizon_s))

    def _conclude(self, warming: _Warming, candidate: _Candidate) -> None:
        if warming.task.cancelled():
            self._cancelled += 1
            if not warming.wanted and self._limits.enabled:
                self._candidates[warming.key] = candidate  # when it is idle again, if that is soon
        elif (error := warming.task.exception()) is not None:
            self._failed += 1
            _log.debug("prefetching failed", exc_info=error)
        else:
            self._warmed += 1
            if not warming.wanted:
                self._awaited[warming.key] = self._clock() + self._limits.horizon_s
