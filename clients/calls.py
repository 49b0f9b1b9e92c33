"""One call to the server: its deadline, its tries, and the error it may end with. All methods of a client go here.

What is *not* known here: what the bodies mean. A call is made of a function that builds the request anew for every
try, since the time that remains travels in it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from .errors import (
    DeadlineExceededError,
    InvalidRequestError,
    Origin,
    PayloadTooLargeError,
    PimoeClientError,
    error_from_answer,
)
from .retries import RetryBudget, pause_s, retry_after_s
from .settings import Limits, RetryPolicy
from .transport import HttpRequest, HttpResponse, Transport

T = TypeVar("T")

MakeRequest = Callable[[float], HttpRequest]  # given the seconds that remain


class Deadline:
    """When a call must have ended.

    Raises:
        InvalidRequestError: `timeout_s` is not a time in the future.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not math.isfinite(timeout_s) or timeout_s <= 0:
            raise InvalidRequestError(f"timeout_s is {timeout_s!r}, and must be more than 0", param="timeout_s")
        self.timeout_s = timeout_s
        self._clock = clock
        self._expires = clock() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left; negative when it has passed."""
        return self._expires - self._clock()

    def exceeded(self, what: str) -> DeadlineExceededError:
        """The error to raise when it has passed."""
        return DeadlineExceededError(f"{what} within {self.timeout_s:g} s")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer with a status of success. `call` is method and path, for messages."""

    call: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Clockwork:
    """Time and chance, given from outside so that tests need neither."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    draw: Callable[[], float] = random.random


@dataclass
class Caller:
    """Sends requests through a transport, each with a deadline, and again where the policy allows it."""

    transport: Transport
    limits: Limits
    policy: RetryPolicy
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets
    clockwork: Clockwork = field(default_factory=Clockwork)

    def __post_init__(self) -> None:
        self._budget = RetryBudget(self.policy, self.clockwork.clock())

    def deadline(self, timeout_s: float) -> Deadline:
        """A deadline that begins now."""
        return Deadline(timeout_s, self.clockwork.clock)

    async def call(self, make: MakeRequest, deadline: Deadline) -> Answer:
        """Sends until there is a whole answer of success.

        Raises:
            PimoeClientError: of the class that fits the last try.
        """
        return await self.retrying(lambda: self.exchange(make, deadline), deadline)

    async def open(self, make: MakeRequest, deadline: Deadline) -> HttpResponse:
        """As `call`, and returns as soon as the head of the answer says success; the caller closes it."""
        return await self.retrying(lambda: self._begin(make, deadline), deadline)

    async def retrying(self, attempt: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
        """Awaits `attempt` again while its errors, the policy, the budget and the deadline allow it."""
        self._budget.deposit()
        for retries_done in itertools.count():
            try:
                return await attempt()
            except PimoeClientError as error:
                pause = self._pause(error, retries_done, deadline)
                if pause is None:
                    if retries_done:
                        error.add_note(f"given up after {retries_done} retries")
                    raise
            await self.clockwork.sleep(pause)
        raise AssertionError("unreachable")

    async def exchange(self, make: MakeRequest, deadline: Deadline) -> Answer:
        """One try: a request, and the whole of its answer."""
        request = make(self._time_left(deadline))
        try:
            async with asyncio.timeout(deadline.remaining_s() + self.limits.grace_s):
                response = await self._send(request)
                body = await self._read(response)
        except TimeoutError:
            raise deadline.exceeded(f"{_name(request)} was not answered") from None
        return Answer(_name(request), response.headers, body)

    async def _begin(self, make: MakeRequest, deadline: Deadline) -> HttpResponse:
        request = make(self._time_left(deadline))
        try:
            async with asyncio.timeout(deadline.remaining_s() + self.limits.grace_s):
                return await self._send(request)
        except TimeoutError:
            raise deadline.exceeded(f"{_name(request)} was not answered") from None

    def _time_left(self, deadline: Deadline) -> float:
        remaining = deadline.remaining_s()
        if remaining <= 0:
            raise deadline.exceeded("no try succeeded")
        return remaining

    async def _send(self, request: HttpRequest) -> HttpResponse:
        if self.headers:
            request = HttpRequest(request.method, request.path, {**self.headers, **request.headers}, request.body)
        response = await self.transport.send(request)
        if response.status // 100 == 2:
            return response
        body = await self._read(response)
        raise error_from_answer(_name(request), origin_of(response), body)

    async def _read(self, response: HttpResponse) -> bytes:
        pieces, nbytes = [], 0
        try:
            while piece := await response.read_some():
                pieces.append(piece)
                nbytes += len(piece)
                if nbytes > self.limits.max_response_bytes:
                    raise PayloadTooLargeError(f"the answer is larger than {self.limits.max_response_bytes} bytes")
        except BaseException:  # a cancelled call too must not leave its connection half read
            response.close()
            raise
        return b"".join(pieces)

    def _pause(self, error: PimoeClientError, retries_done: int, deadline: Deadline) -> float | None:
        """Seconds to wait before the next try; None when there should be none."""
        if not error.retryable or retries_done >= self.policy.max_retries:
            return None
        pause = pause_s(self.policy, retries_done, error.retry_after_s, self.clockwork.draw())
        if pause >= deadline.remaining_s() or not self._budget.withdraw(self.clockwork.clock()):
            return None
        return pause


def origin_of(response: HttpResponse) -> Origin:
    """What the head of an answer adds to an error in it."""
    headers = response.headers
    return Origin(response.status, retry_after_s(headers), headers.get("x-request-id"))


def _name(request: HttpRequest) -> str:
    return f"{request.method} {request.path}"
