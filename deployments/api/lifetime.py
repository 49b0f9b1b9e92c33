"""Bounds one piece of work from outside: by its deadline and by the presence of its caller.

Backends keep deadlines too, but a backend may hang; whoever holds the connection must not. The work runs in
the caller's own task, so an undisturbed request pays one timer and no extra task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any

from ...runtime.errors import DeadlineExceededError, PimoeError, RequestCancelledError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Most tensor requests are answered sooner than this and never start a watcher. Nothing is missed by starting
# late: a server reports a disconnect for as long as it is asked.
WATCH_AFTER_S = 0.1


def cancelled_from_behind() -> bool:
    """Whether a `CancelledError` just caught came out of the work itself: nobody has cancelled this task."""
    task = asyncio.current_task()
    return task is not None and not task.cancelling()


class Lifetime:
    """`async with Lifetime(60.0) as life:` ends its block with `DeadlineExceededError` after 60 s.

    After `watch(receive)` it also ends it, with `RequestCancelledError`, when the client disconnects. In both
    cases the block is cancelled first and has unwound before the error is raised.
    """

    def __init__(self, limit_s: float, started_s: float | None = None) -> None:
        """`started_s`, in loop time, is where `limit_s` counts from; None: from entering the block."""
        self._limit_s = limit_s
        self.started_s = started_s
        self._reason: PimoeError | None = None
        self._receive: Receive | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Lifetime:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a Lifetime needs a task around it")
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self.started_s = now if self.started_s is None else self.started_s
        self._ends_at = self.started_s + self._limit_s
        # One timer for the watcher first, and then for the deadline: most requests need neither.
        self._watch_at: float | None = now + WATCH_AFTER_S
        self._wake_at(min(self._watch_at, self._ends_at))
        return self

    def limit(self, timeout_s: float, grace_s: float = 0.0) -> float:
        """Sets the deadline to `timeout_s` after the start, enforced `grace_s` later.

        Returns:
            The seconds that remain until the deadline, for the backend.

        Raises:
            DeadlineExceededError: nothing remains.
        """
        self._limit_s = timeout_s
        deadline = (self.started_s or 0.0) + timeout_s
        self._ends_at = deadline + grace_s
        if self._watch_at is None or self._ends_at < self._timer_at:
            self._timer.cancel()
            self._wake_at(self._ends_at)
        remaining_s = deadline - self._loop.time()
        if remaining_s <= 0:
            raise self._too_late()
        return remaining_s

    def watch(self, receive: Receive) -> None:
        """From now on, and not before the body is read, takes what `receive` says as news of the client."""
        self._receive = receive
        if self._watch_at is None:  # the body took that long
            self._start_watcher(receive)

    def _wake_at(self, when: float) -> None:
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._wake)

    def _wake(self) -> None:
        if self._watch_at is None or self._ends_at <= self._timer_at:
            self._end(self._too_late())
            return
        self._watch_at = None
        self._wake_at(self._ends_at)
        if self._receive is not None:
            self._start_watcher(self._receive)

    def _start_watcher(self, receive: Receive) -> None:
        self._watcher = self._loop.create_task(self._wait_for_disconnect(receive))

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end(RequestCancelledError("the client closed the connection before the answer"))

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"no answer within the timeout of {self._limit_s:g} s", "timeout")

    def _end(self, reason: PimoeError) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # it knows this
        # As in asyncio.timeout: only a cancellation that is ours alone becomes an error.
        # The error holds the frames of the request, and with them this.
        reason, self._reason = self._reason, None
        if reason is None or self._task.uncancel() > self._cancelling:
            return
        if kind is asyncio.CancelledError:
            raise reason from error
