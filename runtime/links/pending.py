"""The calls of a client that were sent and not answered yet, and their deadlines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DeadlineExceededError, LinkProtocolError, PimoeError
from .messages import Packed, Reply

_SWEEP_S = 0.001

Outcome = Reply | Packed | PimoeError
Answered = Callable[[Outcome], None]


@dataclass(slots=True)
class _Call:
    method: str
    deadline: float
    answered: Answered


class PendingCalls:
    """Tells each call's `answered` its outcome, once. One timer watches over all deadlines: setting one for each
    call would take as long as sending it.

    Args:
        on_expired: told the stream of a call whose time ran out, before the call is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[int], None]) -> None:
        self._loop = loop
        self._on_expired = on_expired
        self._calls: dict[int, _Call] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, stream: int, method: str, deadline: float, answered: Answered) -> None:
        """Wait for the answer to `stream` until `deadline` (`loop.time()`)."""
        self._calls[stream] = _Call(method, deadline, answered)
        if deadline < self._timer_at:
            self._watch_at(deadline)

    def forget(self, stream: int) -> bool:
        """Nobody waits for the answer any more; whether anybody did."""
        return self._calls.pop(stream, None) is not None

    def answer(self, stream: int, outcome: Outcome) -> bool:
        """The answer came; whether anybody waited for it."""
        call = self._calls.pop(stream, None)
        if call is None:
            return False
        call.answered(outcome)
        return True

    def fail_all(self, error: PimoeError) -> None:
        """The link was lost."""
        if self._timer is not None:
            self._timer.cancel()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.answered(error)

    def _watch_at(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(deadline, self._sweep), deadline

    def _sweep(self) -> None:
        """Mostly finds that the call for which the timer was set was answered long ago."""
        now = self._loop.time()
        self._timer, self._timer_at = None, math.inf
        for stream, call in list(self._calls.items()):
            if call.deadline <= now and self.forget(stream):
                self._on_expired(stream)
                call.answered(DeadlineExceededError(f"{call.method} was not answered within its time"))
        if self._calls:
            earliest = min(call.deadline for call in self._calls.values())
            self._watch_at(max(earliest, now + _SWEEP_S))  # of many deadlines close together, several at once


def settle(answer: asyncio.Future[Reply], outcome: Outcome) -> None:
    """`answered` of a call that has a plain answer and is awaited."""
    if answer.done():
        return  # cancelled
    if isinstance(outcome, Reply):
        answer.set_result(outcome)
    else:
        answer.set_exception(unexpected() if isinstance(outcome, Packed) else outcome)


def settle_packed(answer: asyncio.Future[Packed], outcome: Outcome) -> None:
    """As `settle`, of a call that has a packed answer."""
    if answer.done():
        return
    if isinstance(outcome, Packed):
        answer.set_result(outcome)
    else:
        answer.set_exception(unexpected() if isinstance(outcome, Reply) else outcome)


def unexpected() -> LinkProtocolError:
    """The error of a packed answer to a plain call, or the other way round."""
    return LinkProtocolError("the answer is of another kind than the call")
