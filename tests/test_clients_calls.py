"""Deadlines and retries of one call: a scripted transport, and a clock that only the test moves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from pimoe.clients import (
    ConnectionFailed,
    DeadlineExceededError,
    HttpRequest,
    InvalidRequestError,
    Limits,
    OverloadedError,
    PayloadTooLargeError,
    PimoeClientError,
    RetryPolicy,
    UnavailableError,
)
from pimoe.clients.calls import Caller, Clockwork
from scripted_transport import Answer, Reply, ScriptedTransport

BUSY = {"retry-after-ms": "1500"}


@dataclass
class Scene:
    """A caller over `answers`; sleeping moves its clock, and is written down."""

    answers: list[Answer]
    policy: RetryPolicy = field(default_factory=lambda: RetryPolicy(base_delay_s=1.0))
    limits: Limits = field(default_factory=Limits)
    now: float = 100.0
    slept: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.transport = ScriptedTransport(*self.answers)
        clockwork = Clockwork(clock=lambda: self.now, sleep=self.sleep, draw=lambda: 0.5)
        self.caller = Caller(self.transport, self.limits, self.policy, {"x-own": "1"}, clockwork)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def make(self, left_s: float) -> HttpRequest:
        self.left.append(left_s)
        return HttpRequest("POST", "/x", {"x-more": "2"})

    async def call(self, timeout_s: float = 60.0) -> bytes:
        return (await self.caller.call(self.make, self.caller.deadline(timeout_s))).body


def ok() -> Reply:
    return Reply(200, {}, [b"fi", b"ne"])


async def test_a_call_that_succeeds_is_sent_once() -> None:
    scene = Scene([ok()])
    assert await scene.call() == b"fine"
    assert (scene.slept, scene.left) == ([], [60.0])
    assert scene.transport.requests[0].headers == {"x-own": "1", "x-more": "2"}


@pytest.mark.parametrize(
    "first",
    [Reply(429, BUSY), Reply(503, BUSY), Reply(502, BUSY), Reply(503, BUSY, [b'{"code": "link_closed"}'])],
)
async def test_refusals_are_sent_again_after_what_the_server_asked_for(first: Reply) -> None:
    scene = Scene([first, ok()])
    assert await scene.call() == b"fine"
    assert scene.slept == [1.5 + 0.5], "what was asked for, and half of the first backoff"
    assert scene.left == [60.0, 58.0], "the time that remains travels anew"


async def test_broken_connections_are_tried_again_with_backoff() -> None:
    scene = Scene([ConnectionFailed("a"), ConnectionFailed("b"), ConnectionFailed("c"), ok()])
    assert await scene.call() == b"fine"
    assert scene.slept == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("status", [400, 404, 413, 500, 504])
async def test_other_answers_are_final(status: int) -> None:
    scene = Scene([Reply(status, BUSY), ok()])
    with pytest.raises(PimoeClientError) as caught:
        await scene.call()
    assert (caught.value.status, scene.slept) == (status, [])


async def test_the_last_error_is_raised_when_retries_are_used_up() -> None:
    scene = Scene([Reply(429, {"x-request-id": f"r{n}"}) for n in range(9)], RetryPolicy(max_retries=2))
    with pytest.raises(OverloadedError) as caught:
        await scene.call()
    assert (caught.value.request_id, caught.value.__notes__) == ("r2", ["given up after 2 retries"])


async def test_no_retry_that_could_not_be_answered_in_time() -> None:
    scene = Scene([Reply(503, {"retry-after": "10"}), ok()])
    with pytest.raises(UnavailableError) as caught:
        await scene.call(timeout_s=9.0)
    assert (caught.value.retry_after_s, scene.slept) == (10.0, [])


async def test_retries_of_all_calls_share_a_budget() -> None:
    policy = RetryPolicy(max_retries=3, budget_burst=2.0, budget_ratio=0.0, budget_per_s=0.0)
    scene = Scene([Reply(429) for _ in range(9)], policy)
    for _ in range(2):
        with pytest.raises(OverloadedError):
            await scene.call()
    assert len(scene.transport.requests) == 4, "three for the first call, and one for the second"


async def test_a_call_without_an_answer_ends_with_its_deadline() -> None:
    never = asyncio.Event()

    async def hang(_: HttpRequest) -> Reply:
        await never.wait()
        return ok()

    scene = Scene([], limits=Limits(grace_s=0))
    scene.transport = scene.caller.transport = ScriptedTransport(handler=hang)
    with pytest.raises(DeadlineExceededError, match=r"POST /x was not answered within 0\.01 s"):
        await scene.call(timeout_s=0.01)
    assert len(scene.transport.requests) == 1


async def test_a_body_that_stalls_is_dropped_with_its_connection() -> None:
    class Stalling(Reply):
        async def read_some(self) -> bytes:
            await asyncio.Event().wait()
            return b""

    stalling = Stalling()
    scene = Scene([stalling], limits=Limits(grace_s=0))
    with pytest.raises(DeadlineExceededError):
        await scene.call(timeout_s=0.01)
    assert stalling.closed


async def test_answers_are_bounded() -> None:
    reply = Reply(200, {}, [b"abc", b"def"])
    scene = Scene([reply], limits=Limits(max_response_bytes=5))
    with pytest.raises(PayloadTooLargeError, match="5 bytes"):
        await scene.call()
    assert reply.closed


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
async def test_times_that_are_none_are_refused(timeout_s: float) -> None:
    scene = Scene([ok()])
    with pytest.raises(InvalidRequestError, match="timeout_s is") as caught:
        await scene.call(timeout_s)
    assert caught.value.param == "timeout_s"
    assert scene.transport.requests == []


async def test_opening_stops_at_the_head_and_is_retried_until_then() -> None:
    reply = ok()
    scene = Scene([Reply(429), reply])
    assert await scene.caller.open(scene.make, scene.caller.deadline(9.0)) is reply
    assert reply.pieces == [b"fi", b"ne"], "nothing of the body was read"


async def test_headers_stay_out_of_sight() -> None:
    assert "x-own" not in repr(Scene([]).caller)
