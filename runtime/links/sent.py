"""Packed calls that no coroutine carries: they go out at once, and cost no task unless they go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import PimoeError
from .messages import Packed
from .pending import Outcome, unexpected

if TYPE_CHECKING:
    from .pool import LinkPool, PooledLink


class SentCall:
    """Made by `LinkPool.send`. Tells `done` the answer or the error, once, unless it is cancelled before."""

    __slots__ = ("_deadline", "_done", "_final", "_link", "_method", "_packed", "_pool", "_stream", "_task")

    def __init__(
        self,
        pool: LinkPool,
        method: str,
        packed: Packed,
        deadline: float,
        done: Callable[[Packed | BaseException], None],
    ) -> None:
        self._pool, self._method, self._packed, self._deadline, self._done = pool, method, packed, deadline, done
        self._link: PooledLink | None = None
        self._task: asyncio.Task[None] | None = None
        self._begin()

    def cancel(self) -> asyncio.Task[None] | None:
        """Give it up. What is returned ends when it has."""
        if self._link is not None:
            link, self._link = self._link, None
            link.client.cancel(self._stream)
            self._pool.release(link)
        if self._task is not None:
            self._task.cancel()
        return self._task

    def _begin(self) -> None:
        pool = self._pool
        link, attempt_at = pool.free_link(), pool.attempt_deadline(self._deadline)
        if link is None or not link.client.writable or attempt_at is None:
            self._go_on(0)  # there is something to wait for, or to complain of
            return
        self._final = attempt_at >= self._deadline
        try:
            self._stream = link.client.send(self._method, self._packed, attempt_at, self._answered)
        except PimoeError:
            self._go_on(0)  # meets it again
            return
        pool.take(link)
        self._link = link

    def _answered(self, outcome: Outcome) -> None:
        link, self._link = self._link, None
        assert link is not None
        self._pool.release(link)
        if isinstance(outcome, Packed):
            self._done(outcome)
        elif isinstance(outcome, PimoeError):
            if self._pool.excuses(link, outcome, self._final):
                self._go_on(self._pool.count_lost(link, outcome, 0))
            else:
                self._done(outcome)
        else:
            self._done(unexpected())

    def _go_on(self, lost: int) -> None:
        self._task = asyncio.get_running_loop().create_task(self._call_others(lost))

    async def _call_others(self, lost: int) -> None:
        try:
            outcome: Packed | BaseException = await self._pool.call_packed(
                self._method, self._packed, self._deadline, lost
            )
        except Exception as error:  # whoever waits is told, whatever it is
            outcome = error
        self._done(outcome)
