"""Single flight: equal requests at the same time share one computation, streams included."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Generic, TypeVar

from ..errors import DeadlineExceededError, RequestCancelledError

V = TypeVar("V")


def _nothing() -> None:
    """Nobody is to be told any more."""


def _drop(items: list[V]) -> None:
    """As `_nothing`."""


class Flight(Generic[V]):
    """One computation and its readers. Each reader gets every item from the first on, whenever it joins.

    The computation runs in a task of its own, so that the request that began it may leave without ending it for
    the others; when the last reader leaves, it is cancelled. It does not wait for slow readers: all items are kept
    for those to come, as many as one answer has.

    Args:
        items: the computation.
        began: called when it has given its first item, or ended whole without one; before a reader sees it.
        finished: called when it has ended whole, with all items.
        ended: called when no reader may join any more: it has ended in any way, or nobody is left. Perhaps twice.

    Attributes:
        error: what the computation raised; the very one that readers are given.
        is_abandoned: its last reader left before its end.
    """

    def __init__(
        self,
        items: AsyncGenerator[V, None],
        began: Callable[[], None],
        finished: Callable[[list[V]], None],
        ended: Callable[[], None],
    ) -> None:
        self.error: Exception | None = None
        self.is_abandoned = False
        self._items: list[V] = []
        self._done = False
        self._successor: Flight[V] | None = None
        self._readers = 0
        self._changed = asyncio.Event()
        self._began, self._finished, self._ended = began, finished, ended
        self._task = asyncio.create_task(self._run(items))

    @property
    def is_empty(self) -> bool:
        """Whether it goes on and has given nothing yet."""
        return not (self._items or self._done)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, in any way."""
        return self._done

    def supersede(self, successor: Flight[V]) -> None:
        """End it, while it `is_empty`, for another computation of the same that has begun: its readers are that
        one's from now on, and need not know. That one must not be superseded in turn."""
        successor._readers += self._readers
        self._readers = 0
        self._successor, self._done = successor, True
        self._task.cancel()
        self._notify()

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Count as a reader, from before the first item is read."""
        self._readers += 1
        try:
            yield
        finally:
            flight = self._successor or self
            flight._readers -= 1
            if flight._readers == 0 and not flight._done:
                flight._abandon()

    async def read(self, deadline: float, position: int = 0) -> AsyncGenerator[V, None]:
        """All items, from the one at `position`; for those who have `joined`.

        Args:
            deadline: the reader's own, on `time.monotonic()`.

        Raises:
            DeadlineExceededError: the reader's time ran out; the flight goes on for the others.
            PimoeError: what the computation raised, or its successor.
        """
        while True:
            flight = self._successor or self
            while position < len(flight._items):
                position += 1
                yield flight._items[position - 1]
            if flight._done:
                if flight.error is not None:
                    raise flight.error
                return
            await flight._wait(deadline)

    def _abandon(self) -> None:
        # Now, and not when it has ended: a task that is cancelled before its first step never comes to say so.
        self.error = RequestCancelledError("the shared computation was cancelled")
        self._done = self.is_abandoned = True
        self._tell_of_end()
        self._task.cancel()
        self._notify()

    async def _wait(self, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out") from None

    async def _run(self, items: AsyncGenerator[V, None]) -> None:
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    if self._done:  # it was given up, and did not heed that
                        return
                    self._items.append(item)
                    if len(self._items) == 1:
                        self._began()
                    self._notify()
            if self._done:
                return
            if not self._items:
                self._began()
            self._finished(self._items)
        except asyncio.CancelledError:
            self.error = self.error or RequestCancelledError("the shared computation was cancelled")
        except Exception as error:  # every reader is given it
            self.error = self.error or error
        finally:
            self._done = True
            self._tell_of_end()
            self._notify()

    def _tell_of_end(self) -> None:
        self._ended()
        # Who is told may hold this: request and answer are not to wait for the garbage collector.
        self._began = self._ended = _nothing
        self._finished = _drop

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
