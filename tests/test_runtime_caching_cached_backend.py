"""The cache in front of a backend: hits, flights, and what is never stored."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cache_backend import MODEL, Backend, Refused, generation, inference, tokens
from pimoe.runtime.caching import CachedBackend, CacheLimits, ResultCache
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError, RequestCancelledError, UnavailableError
from pimoe.runtime.requests import (
    GenerateAnswer,
    GenerateRequest,
    InferAnswer,
    InferRequest,
    InferResult,
    TensorData,
    TokenChunk,
    TokenLogprob,
)
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TINY_S = 0.02


def caching(limits: CacheLimits | None = None, **options: Any) -> tuple[Backend, CachedBackend]:
    backend = Backend()
    seconds = iter(range(1000, 2000))
    cached = CachedBackend(
        backend, ResultCache(limits or CacheLimits()), wall_clock=lambda: next(seconds) + 0.5, **options
    )
    return backend, cached


async def read(answer: GenerateAnswer) -> list[TokenChunk]:
    return [chunk async for chunk in answer.chunks]


async def ask(cached: CachedBackend, request: GenerateRequest | None = None) -> tuple[str, list[int]]:
    answer = await cached.generate(request or generation())
    return answer.outcome, tokens(await read(answer))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def counts(cached: CachedBackend) -> tuple[int, int, int, int]:
    statistics = cached.cache.statistics()
    return statistics.hits, statistics.misses, statistics.coalesced, statistics.bypassed


# Hits and identity


async def test_a_repeated_generation_is_answered_from_the_cache() -> None:
    backend, cached = caching()
    backend.allow()
    first = await cached.generate(generation("first"))
    chunks = await read(first)
    second = await cached.generate(generation("second"))
    assert (first.outcome, second.outcome) == ("miss", "hit")
    assert await read(second) == chunks
    assert tokens(chunks) == [0, 1, 2, 3]
    # Byte for byte the computed answer: its identity too.
    assert (second.response_id, second.created_s) == (first.response_id, first.created_s) == ("first", 1000)
    assert len(backend.generations) == 1
    assert counts(cached) == (1, 1, 0, 0)


async def test_a_repeated_tensor_request_is_answered_from_the_cache() -> None:
    backend, cached = caching()
    backend.allow()
    answers = [await cached.infer(inference(name, 3.0)) for name in "ab"]
    assert [answer.outcome for answer in answers] == ["miss", "hit"]
    assert (np.frombuffer(answers[1].result.output.data, np.float32) == 6.0).all()
    assert (await cached.infer(inference("c", 4.0))).outcome == "miss"
    assert len(backend.inferences) == 2


async def test_what_is_stored_holds_no_memory_of_the_link_that_it_came_over() -> None:
    """Whose room for bodies under way it would take for hours."""
    backend, cached = caching()
    backend.allow()
    bodies: list[weakref.ref[Any]] = []

    async def infer(request: InferRequest) -> InferResult:
        body = np.arange(4, dtype=np.uint8)
        bodies.append(weakref.ref(body))
        return InferResult(TensorData("float32", (1, 1), body.data))

    backend.infer = infer  # type: ignore[method-assign]
    for outcome in ("miss", "hit"):
        answer: InferAnswer | None = await cached.infer(inference())
        assert answer is not None
        assert (answer.outcome, bytes(answer.result.output.data)) == (outcome, bytes(range(4)))
        answer = None
        await settle()
        gc.collect()
    assert [body() for body in bodies] == [None]


async def test_requests_that_differ_share_nothing() -> None:
    backend, cached = caching()
    backend.allow()
    assert await ask(cached, generation(max_tokens=2)) == ("miss", [0, 1])
    assert await ask(cached, generation(max_tokens=3)) == ("miss", [0, 1, 2])
    assert await ask(cached, generation(max_tokens=2, tenant="another")) == ("miss", [0, 1])


async def test_bypassing_neither_reads_nor_writes() -> None:
    backend, cached = caching()
    backend.allow()
    for _ in range(2):
        answer = await cached.generate(generation("id"), bypass="asked")
        assert (answer.outcome, answer.response_id) == ("bypass", "id")
        assert tokens(await read(answer)) == [0, 1, 2, 3]
        assert (await cached.infer(inference(), bypass="asked")).outcome == "bypass"
    assert cached.cache.statistics().entries == 0
    assert counts(cached) == (0, 0, 0, 4)
    assert len(backend.generations) == len(backend.inferences) == 2


async def test_a_cache_that_is_switched_off_shares_nothing() -> None:
    backend, cached = caching(CacheLimits(max_bytes=0))
    answers = [await cached.generate(generation()) for _ in range(2)]
    assert [answer.outcome for answer in answers] == ["bypass", "bypass"]
    backend.allow()
    assert [tokens(await read(answer)) for answer in answers] == [[0, 1, 2, 3]] * 2


async def test_the_model_is_the_backends() -> None:
    assert caching()[1].model is MODEL


# Single flight


async def test_equal_generations_share_one_computation_from_its_start() -> None:
    backend, cached = caching()
    leader = await cached.generate(generation("leader"))
    backend.allow(2)
    assert tokens([await anext(leader.chunks), await anext(leader.chunks)]) == [0, 1]
    followers = [await cached.generate(generation(f"f{n}")) for n in range(3)]
    assert [(f.outcome, f.response_id, f.created_s) for f in followers] == [("coalesced", "leader", 1000)] * 3
    reading = [asyncio.create_task(read(answer)) for answer in followers]
    backend.allow()
    assert [tokens(chunks) for chunks in await asyncio.gather(*reading)] == [[0, 1, 2, 3]] * 3
    assert tokens(await read(leader)) == [2, 3]
    assert len(backend.generations) == 1
    assert counts(cached) == (0, 1, 3, 0)
    assert (await cached.generate(generation())).outcome == "hit"


async def test_equal_tensor_requests_share_one_computation() -> None:
    backend, cached = caching()
    requests = [asyncio.create_task(cached.infer(inference(str(n)))) for n in range(5)]
    await settle()
    backend.allow()
    answers = await asyncio.gather(*requests)
    assert [answer.outcome for answer in answers] == ["miss"] + ["coalesced"] * 4
    assert len(backend.inferences) == 1


async def test_a_leaving_leader_does_not_kill_its_followers() -> None:
    backend, cached = caching()
    leader = await cached.generate(generation("leader"))
    backend.allow(1)
    await anext(leader.chunks)
    follower = await cached.generate(generation("follower"))
    await leader.chunks.aclose()
    backend.allow()
    assert tokens(await read(follower)) == [0, 1, 2, 3]
    assert len(backend.generations) == 1
    assert (await cached.generate(generation())).response_id == "leader"


async def test_the_last_reader_to_leave_cancels_the_computation() -> None:
    backend, cached = caching()
    answers = [await cached.generate(generation()) for _ in range(3)]
    backend.allow(1)
    for answer in answers:
        await anext(answer.chunks)
    for answer in answers:
        assert backend.closed == 0
        await answer.chunks.aclose()
    await eventually(lambda: backend.closed == 1)
    backend.allow()
    assert await ask(cached) == ("miss", [0, 1, 2, 3])  # nothing of it was stored


@pytest.mark.parametrize("turns", [0, 1, 5])
async def test_closing_before_the_first_item_cancels(turns: int) -> None:
    backend, cached = caching()
    answer = await cached.generate(generation())
    for _ in range(turns):
        await asyncio.sleep(0)
    await answer.chunks.aclose()
    await settle()
    assert backend.closed == len(backend.generations)
    assert cached._flights == {}
    backend.allow()
    assert await within_patience(ask(cached)) == ("miss", [0, 1, 2, 3])


async def test_an_answer_that_is_forgotten_is_closed() -> None:
    backend, cached = caching()
    answer: GenerateAnswer | None = await cached.generate(generation())
    await settle()
    assert len(backend.generations) == 1
    del answer
    gc.collect()
    await eventually(lambda: backend.closed == 1)
    assert cached._flights == {}


async def test_a_follower_that_leaves_does_not_end_it_for_a_leader_that_has_not_begun() -> None:
    backend, cached = caching()
    leader = await cached.generate(generation())
    follower = await cached.generate(generation())
    await follower.chunks.aclose()
    backend.allow()
    assert tokens(await read(leader)) == [0, 1, 2, 3]
    assert len(backend.generations) == 1


async def test_a_cancelled_tensor_request_leaves_the_others() -> None:
    backend, cached = caching()
    requests = [asyncio.create_task(cached.infer(inference(str(n)))) for n in range(3)]
    await settle()
    requests[0].cancel()
    await settle()
    backend.allow()
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    assert [getattr(outcome, "outcome", type(outcome)) for outcome in outcomes] == [
        asyncio.CancelledError,
        "coalesced",
        "coalesced",
    ]
    again = asyncio.create_task(cached.infer(inference("x", 9.0)))
    backend._steps = asyncio.Semaphore(0)
    await eventually(lambda: len(backend.inferences) == 2)
    again.cancel()
    await eventually(lambda: backend.closed == 2)
    assert cached._flights == {}


async def test_who_comes_while_a_flight_is_being_cancelled_begins_anew() -> None:
    backend, cached = caching()
    first = await cached.generate(generation("first"))
    await settle()
    await first.chunks.aclose()
    second = await cached.generate(generation("second"))  # the cancelled computation has not ended yet
    assert (second.outcome, second.response_id) == ("miss", "second")
    backend.allow()
    assert tokens(await read(second)) == [0, 1, 2, 3]


# Deadlines and failures


async def test_a_follower_keeps_its_own_deadline() -> None:
    backend, cached = caching()
    leader = await cached.generate(generation())
    follower = await cached.generate(generation(timeout_s=TINY_S))
    with pytest.raises(DeadlineExceededError):
        await read(follower)
    with pytest.raises(DeadlineExceededError):
        await cached.infer(inference(timeout_s=TINY_S))
    backend.allow()
    assert tokens(await read(leader)) == [0, 1, 2, 3]
    assert len(backend.generations) == 1


@pytest.mark.parametrize(
    "reason", [DeadlineExceededError("late"), OverloadedError("full"), RequestCancelledError("gone")]
)
@pytest.mark.parametrize("before", [0, 2])
async def test_followers_go_on_when_the_leader_fails_for_its_own_reason(reason: Exception, before: int) -> None:
    backend, cached = caching()
    leader = await cached.generate(generation("leader", timeout_s=5.0))
    followers = [await cached.generate(generation(f"f{n}", timeout_s=20.0)) for n in range(3)]
    reading = [asyncio.create_task(read(answer)) for answer in (leader, *followers)]
    backend.allow(before)
    await settle()
    backend.failures = [reason]
    backend.allow()
    led, *followed = await asyncio.gather(*reading, return_exceptions=True)
    assert led is reason
    # No item twice, none missing, and once more computed for all of them together.
    assert [tokens(chunks) for chunks in followed] == [[0, 1, 2, 3]] * 3  # type: ignore[arg-type]
    assert len(backend.generations) == 2
    assert backend.generations[0].timeout_s == 5.0
    assert 5.0 < backend.generations[1].timeout_s < 20.0  # what remained of a follower's own
    hit = await cached.generate(generation())
    assert (hit.outcome, hit.response_id) == ("hit", "leader")  # what all of them were told
    assert tokens(await read(hit)) == [0, 1, 2, 3]


async def test_a_follower_whose_own_time_is_over_does_not_begin_anew() -> None:
    backend, cached = caching()
    leader = await cached.generate(generation())
    follower = await cached.generate(generation(timeout_s=TINY_S))
    end = asyncio.get_running_loop().time() + 2 * TINY_S
    await eventually(lambda: asyncio.get_running_loop().time() > end)
    backend.failures = [DeadlineExceededError("the leader's")]
    backend.allow()
    for answer in (leader, follower):
        with pytest.raises(DeadlineExceededError):
            await read(answer)
    assert len(backend.generations) == 1


async def test_a_timer_that_fires_early_is_no_reason_to_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cached = caching()
    leader = await cached.generate(generation())
    late = SimpleNamespace(monotonic=lambda: time.monotonic() - 1.0)
    monkeypatch.setattr("pimoe.runtime.caching.cached_backend.time", late)
    follower = await cached.generate(generation(timeout_s=TINY_S))
    with pytest.raises(DeadlineExceededError):
        await read(follower)
    assert len(backend.generations) == 1
    await leader.chunks.aclose()


async def test_a_failing_tensor_request_is_computed_again_for_its_followers() -> None:
    backend, cached = caching()
    requests = [asyncio.create_task(cached.infer(inference(str(n)))) for n in range(3)]
    await settle()
    backend.failures = [OverloadedError("full")]
    backend.allow()
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(outcomes[0], OverloadedError)
    assert [outcome.outcome for outcome in outcomes[1:]] == ["coalesced"] * 2  # type: ignore[union-attr]
    assert len(backend.inferences) == 2


async def test_every_one_that_begins_anew_may_fail_in_turn() -> None:
    backend, cached = caching()
    answers = [await cached.generate(generation(str(n))) for n in range(4)]
    reading = [asyncio.create_task(read(answer)) for answer in answers]
    await settle()
    backend.failures = [OverloadedError(str(n)) for n in range(3)]
    backend.allow()
    outcomes = await within_patience(asyncio.gather(*reading, return_exceptions=True))
    assert [type(outcome) for outcome in outcomes].count(OverloadedError) == 3
    assert [tokens(chunks) for chunks in outcomes if isinstance(chunks, list)] == [[0, 1, 2, 3]]
    assert cached._flights == {}


@pytest.mark.parametrize(
    "error", [Refused("the request is wrong"), UnavailableError("no router"), ValueError("bug")]
)
async def test_an_error_of_the_computation_is_everybodys_and_is_not_stored(error: Exception) -> None:
    backend, cached = caching()
    reading = [asyncio.create_task(read(await cached.generate(generation(str(n))))) for n in range(3)]
    await settle()
    backend.allow(2)
    await settle()
    backend.failures = [error]
    backend.allow()
    assert await asyncio.gather(*reading, return_exceptions=True) == [error] * 3
    assert len(backend.generations) == 1
    assert cached.cache.statistics().entries == 0
    assert await ask(cached) == ("miss", [0, 1, 2, 3])


async def test_a_backend_that_refuses_at_once_leaves_nothing_open() -> None:
    backend, cached = caching()

    def refuse(request: GenerateRequest) -> Any:
        raise Refused("a layer model answers tensor requests only")

    backend.generate = refuse  # type: ignore[method-assign]
    for bypass in (None, "asked"):
        with pytest.raises(Refused):
            await read(await cached.generate(generation(), bypass))
    assert cached._flights == {}


# What is never stored


async def test_cut_streams_are_not_stored() -> None:
    backend, cached = caching()
    backend.allow()
    backend.cut = True
    assert await ask(cached) == ("miss", [0, 1, 2, 3])
    assert await ask(cached) == ("miss", [0, 1, 2, 3])
    assert cached.cache.statistics().entries == 0


async def test_output_that_is_not_finite_is_not_stored() -> None:
    backend, cached = caching()
    backend.allow()
    backend.poison = True
    for _ in range(2):
        answer = await cached.infer(inference())
        assert answer.outcome == "miss"
        assert np.isnan(np.frombuffer(answer.result.output.data, np.float32)[-1])
    backend.poison = False
    assert [(await cached.infer(inference())).outcome for _ in range(2)] == ["miss", "hit"]


async def test_answers_over_the_limit_are_given_and_not_stored() -> None:
    backend, cached = caching(CacheLimits(max_entry_bytes=520))
    backend.allow()
    assert [(await cached.infer(inference())).outcome for _ in range(2)] == ["miss", "miss"]
    assert [await ask(cached) for _ in range(2)] == [("miss", [0, 1, 2, 3])] * 2
    assert cached.cache.statistics().too_large == 4


async def test_stored_bytes_are_about_the_memory_of_the_answer() -> None:
    backend, cached = caching()
    backend.allow()
    await cached.infer(inference())
    assert cached.cache.statistics().bytes == 512 + 2 * 4 * 4
    await ask(cached, generation(max_tokens=100))
    assert cached.cache.statistics().bytes == 2 * 512 + 32 + 100 * 96


async def test_logprobs_count_into_the_size() -> None:
    backend, cached = caching()
    chunk = TokenChunk((1,), "stop", (TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.0))),))

    async def generate(request: GenerateRequest) -> Any:
        yield chunk

    backend.generate = generate  # type: ignore[method-assign]
    await read(await cached.generate(generation()))
    assert cached.cache.statistics().bytes == 512 + 96 + 3 * 160
    assert await read(await cached.generate(generation())) == [chunk]


@pytest.mark.parametrize("seed", range(3))
async def test_readers_that_come_and_go_leave_nothing_open(seed: int) -> None:
    chance = random.Random(seed)
    backend, cached = caching()
    whole = 0

    async def reader(request: GenerateRequest, patience: int) -> None:
        nonlocal whole
        answer = await cached.generate(request)
        seen: list[TokenChunk] = []
        async with contextlib.aclosing(answer.chunks):
            async for chunk in answer.chunks:
                seen.append(chunk)
                if len(seen) > patience:
                    return
        assert tokens(seen) == list(range(request.sampling.max_tokens))
        whole += 1

    readers = []
    for n in range(150):
        request = generation(str(n), max_tokens=chance.randrange(1, 4))
        readers.append(asyncio.create_task(reader(request, chance.choice([0, 1, 99, 99]))))
        if chance.random() < 0.5:
            await asyncio.sleep(0)
        if chance.random() < 0.3:
            chance.choice(readers).cancel()
        if chance.random() < 0.1:
            backend.failures.append(OverloadedError("now and then"))
        if chance.random() < 0.2:
            cached.cache.clear()
        backend.allow(1)
    backend.failures.clear()
    backend.allow()
    outcomes = await within_patience(asyncio.gather(*readers, return_exceptions=True))
    assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError, OverloadedError}
    assert whole > 20
    await eventually(lambda: backend.closed == len(backend.generations))
    assert cached._flights == {}
