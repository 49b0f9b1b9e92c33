"""The cache with tenants, a second level, urgent followers and flushes."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cache_backend import MODEL, Backend, generation, inference, tokens
from fake_second_level import FakeSecondLevel
from pimoe.runtime.caching import (
    CachedBackend,
    CacheLimits,
    Prefetcher,
    PrefetchLimits,
    RedisLevel,
    RedisLimits,
    ResultCache,
    Serving,
)
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError, UnavailableError
from pimoe.runtime.requests import GenerateAnswer, GenerateRequest, TokenChunk
from redis_server import RedisServer, redis_server
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind", "redis_server"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TINY_S = 0.02


class Gateways:
    """Gateways over one backend and one second level; time is the test's."""

    def __init__(self, second: Any = None, **options: Any) -> None:
        self.backend = Backend()
        self.second = second
        self.now = 0.0
        self._options = options
        self._seconds = iter(range(1000, 2000))

    def open(self, limits: CacheLimits | None = None) -> CachedBackend:
        cache: Any = ResultCache(limits or CacheLimits(), lambda: self.now)
        wall_clock = lambda: next(self._seconds) + 0.5  # noqa: E731
        return CachedBackend(self.backend, cache, self.second, wall_clock=wall_clock, **self._options)


async def read(answer: GenerateAnswer) -> list[TokenChunk]:
    return [chunk async for chunk in answer.chunks]


async def ask(cached: CachedBackend, request: GenerateRequest | None = None) -> tuple[str, list[int]]:
    answer = await cached.generate(request or generation())
    return answer.outcome, tokens(await read(answer))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def outcomes(cached: CachedBackend) -> dict[str, int]:
    return {name: count for name, count in cached.statistics().outcomes.items() if count}


# Tenants


async def test_tenants_share_nothing_unless_configured() -> None:
    for share, expected in ((False, "miss"), (True, "hit")):
        gateways = Gateways(share_tenants=share)
        gateways.backend.allow()
        cached = gateways.open()
        first = [await ask(cached, generation(tenant="a")), await ask(cached, generation(tenant="b"))]
        assert [outcome for outcome, _ in first] == ["miss", expected]
        requests = [replace(inference(), tenant=tenant) for tenant in "ab"]
        assert [(await cached.infer(request)).outcome for request in requests] == ["miss", expected]


async def test_tenants_do_not_join_each_others_computations() -> None:
    gateways = Gateways()
    cached = gateways.open()
    asked = [await cached.generate(generation(tenant=tenant)) for tenant in "ab"]
    assert [answer.outcome for answer in asked] == ["miss", "miss"]
    gateways.backend.allow()
    assert [tokens(await read(answer)) for answer in asked] == [[0, 1, 2, 3]] * 2


async def test_other_servings_share_nothing() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    assert await ask(gateways.open()) == ("miss", [0, 1, 2, 3])
    await settle()
    assert (await ask(gateways.open()))[0] == "hit"
    gateways._options["serving"] = Serving(tokenizer_digest="other")
    assert (await ask(gateways.open()))[0] == "miss"


async def test_bypasses_are_counted_by_reason() -> None:
    gateways = Gateways()
    gateways.backend.allow()
    cached, off = gateways.open(), gateways.open(CacheLimits(max_bytes=0))
    await cached.infer(inference(), "asked")
    await read(await cached.generate(generation(), "nondeterministic"))
    await ask(off)
    assert cached.statistics().bypass_reasons == {"asked": 1, "disabled": 0, "nondeterministic": 1}
    assert off.statistics().bypass_reasons == {"asked": 0, "disabled": 1, "nondeterministic": 0}
    assert outcomes(cached) == {"bypass": 2}
    assert off.statistics().memory.bypassed == 1


# Two levels


async def test_a_gateway_finds_what_another_computed() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    one, another = gateways.open(), gateways.open()
    first = await one.generate(generation("first"))
    chunks = await read(first)
    second = await another.generate(generation("second"))
    assert (first.outcome, second.outcome) == ("miss", "hit")
    assert (second.response_id, second.created_s) == ("first", first.created_s)
    assert await read(second) == chunks
    third = await another.generate(generation("third"))  # now from its own memory
    assert (third.outcome, third.response_id) == ("hit", "first")
    assert await read(third) == chunks
    assert (len(gateways.backend.generations), gateways.second.lookups, gateways.second.puts) == (1, 2, 1)
    assert (outcomes(one), outcomes(another)) == ({"miss": 1}, {"second": 1, "memory": 1})


async def test_tensors_are_found_too() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    answers = [await gateways.open().infer(inference(name, 3.0)) for name in "ab"]
    assert [answer.outcome for answer in answers] == ["miss", "hit"]
    assert (np.frombuffer(answers[1].result.output.data, np.float32) == 6.0).all()
    assert answers[0].result.output.data == answers[1].result.output.data


async def test_equal_requests_share_one_lookup() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    await ask(gateways.open())
    cached = gateways.open()
    gateways.second.gate.clear()
    asking = [asyncio.create_task(ask(cached, generation(str(n)))) for n in range(5)]
    await settle()
    assert gateways.second.lookups == 2
    gateways.second.gate.set()
    assert await asyncio.gather(*asking) == [("hit", [0, 1, 2, 3])] * 5
    assert outcomes(cached) == {"second": 5}
    assert len(gateways.backend.generations) == 1


async def test_a_lookup_that_misses_is_shared_as_well() -> None:
    gateways = Gateways(FakeSecondLevel())
    cached = gateways.open()
    gateways.second.gate.clear()
    asking = [asyncio.create_task(ask(cached, generation(str(n)))) for n in range(3)]
    await settle()
    assert gateways.backend.generations == []
    gateways.second.gate.set()
    gateways.backend.allow()
    assert [outcome for outcome, _ in await asyncio.gather(*asking)] == ["miss", "coalesced", "coalesced"]
    assert (gateways.second.lookups, len(gateways.backend.generations)) == (1, 1)


async def test_age_is_carried_to_the_first_level() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    await ask(gateways.open())
    cached = gateways.open(CacheLimits(ttl_s=100.0))
    gateways.second.remaining_s = 30.0
    assert (await ask(cached))[0] == "hit"
    gateways.second.entries.clear()
    gateways.now = 29.0
    assert (await ask(cached))[0] == "hit"
    gateways.now = 31.0
    assert (await ask(cached))[0] == "miss"


async def test_an_answer_that_is_not_this_requests_is_computed() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    await ask(gateways.open(), generation(max_tokens=4))
    ((key, entry),) = gateways.second.entries.items()
    gateways.backend.cut = False
    gateways.open()
    gateways.backend.model = replace(MODEL, vocab_size=2)  # its tokens are none of this model's
    assert (await ask(gateways.open(), generation(max_tokens=2)))[0] == "miss"
    assert (key, entry) in gateways.second.entries.items()


async def test_what_is_not_stored_is_not_stored_anywhere() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    cached = gateways.open()
    gateways.backend.cut = True
    await ask(cached)
    gateways.backend.poison = True
    await cached.infer(inference())
    assert gateways.second.puts == 0


async def test_without_a_second_level_that_answers_everything_is_computed() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.second.away = True
    gateways.backend.allow()
    cached = gateways.open()
    assert [(await ask(cached))[0] for _ in range(2)] == ["miss", "hit"]
    assert gateways.second.puts == 0


async def test_leaving_during_the_lookup_ends_it() -> None:
    gateways = Gateways(FakeSecondLevel())
    cached = gateways.open()
    gateways.second.gate.clear()
    asking = asyncio.create_task(ask(cached))
    await settle()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: not cached._flights)
    assert gateways.backend.generations == []


async def test_a_deadline_holds_during_the_lookup() -> None:
    gateways = Gateways(FakeSecondLevel())
    cached = gateways.open()
    gateways.second.gate.clear()
    with pytest.raises(DeadlineExceededError):
        await ask(cached, generation(timeout_s=TINY_S))
    assert not cached._flights


async def test_with_a_real_server_in_between(redis_server: RedisServer) -> None:
    limits = RedisLimits(redis_server.url, lookup_timeout_s=10.0, encryption_key="0f" * 16)
    levels = [RedisLevel(limits) for _ in range(2)]
    gateways = Gateways()
    gateways.backend.allow()
    one, another = gateways.open(), gateways.open()
    one.second, another.second = levels
    first = await one.infer(inference("a", 3.0))
    await eventually(lambda: levels[0].statistics().written == 1)
    found = await another.infer(inference("b", 3.0))
    assert (first.outcome, found.outcome) == ("miss", "hit")
    assert bytes(first.result.output.data) == bytes(found.result.output.data)
    redis_server.kill()
    assert (await another.infer(inference("c", 4.0))).outcome == "miss"
    assert (await another.infer(inference("d", 4.0))).outcome == "hit"
    for level in levels:
        await level.close()


# Urgent followers; `test_runtime_caching_sharing` has what they do beside a computation


@pytest.mark.parametrize("priority", [0.1, 0.5])
async def test_one_that_is_not_more_urgent_joins(priority: float) -> None:
    gateways = Gateways()
    cached = gateways.open()
    leader = await cached.generate(generation(priority=0.5))
    follower = await cached.generate(generation(priority=priority))
    gateways.backend.allow()
    assert follower.outcome == "coalesced"
    assert tokens(await read(leader)) == tokens(await read(follower)) == [0, 1, 2, 3]
    assert len(gateways.backend.generations) == 1


async def test_after_the_first_item_the_urgent_join_too() -> None:
    gateways = Gateways()
    cached = gateways.open()
    leader = await cached.generate(generation(priority=0.1))
    gateways.backend.allow(1)
    await anext(leader.chunks)
    urgent = await cached.generate(generation(priority=0.9))
    assert urgent.outcome == "coalesced"
    gateways.backend.allow()
    assert (tokens(await read(leader)), tokens(await read(urgent))) == ([1, 2, 3], [0, 1, 2, 3])


async def test_during_the_lookup_an_urgent_one_computes_in_the_leaders_place() -> None:
    gateways = Gateways(FakeSecondLevel())
    cached = gateways.open()
    gateways.second.gate.clear()
    asking = []
    for name, priority in (("slow", 0.1), ("urgent", 0.9), ("middle", 0.5)):
        asking.append(asyncio.create_task(ask(cached, generation(name, priority=priority))))
        await settle()
    gateways.second.gate.set()
    gateways.backend.allow()
    answers = await asyncio.gather(*asking)
    assert [outcome for outcome, _ in answers] == ["coalesced", "miss", "coalesced"]
    assert [items for _, items in answers] == [[0, 1, 2, 3]] * 3
    assert [request.priority for request in gateways.backend.generations] == [0.9]
    assert gateways.second.lookups == 1


async def test_each_keeps_its_own_deadline_when_it_moves() -> None:
    gateways = Gateways()
    cached = gateways.open()
    hasty = await cached.generate(generation("hasty", timeout_s=TINY_S, priority=0.1))
    patient = await cached.generate(generation("patient", priority=0.1))
    urgent = await cached.generate(generation("urgent", priority=0.9))
    with pytest.raises(DeadlineExceededError):
        await read(hasty)
    gateways.backend.allow()
    assert tokens(await read(urgent)) == tokens(await read(patient)) == [0, 1, 2, 3]


async def test_urgent_tensor_requests_are_computed_once_for_each_class() -> None:
    gateways = Gateways()
    cached = gateways.open()
    requests = [replace(inference(str(n)), priority=n / 10) for n in (0, 1, 2, 3, 9)]
    asking = []
    for request in requests:
        asking.append(asyncio.create_task(cached.infer(request)))
        await settle()
    gateways.backend.allow()
    answers = await asyncio.gather(*asking)
    assert len({bytes(answer.result.output.data) for answer in answers}) == 1
    assert [request.priority for request in gateways.backend.inferences] == [0.0, 0.2, 0.9]
    await eventually(lambda: gateways.backend.closed == 3)


# Computing ahead


class Watched:
    """A watcher that writes down what it is told."""

    def __init__(self, cached: CachedBackend) -> None:
        self.cached = cached
        self.seen: list[tuple[str, str, bool]] = []
        self.idle: list[bool] = []
        cached.watcher = self

    def observe(self, tenant: str, key: bytes, request: Any) -> None:
        self.seen.append((tenant, request.request_id, self.cached.is_idle()))

    def load_changed(self) -> None:
        self.idle.append(self.cached.is_idle())


async def test_a_watcher_is_told_what_comes_and_when_all_is_answered() -> None:
    gateways = Gateways()
    cached = gateways.open()
    watched = Watched(cached)
    first = await cached.generate(generation("a", tenant="x"))
    second = await cached.generate(generation("b", tenant="x"))
    assert watched.seen == [("x", "a", False), ("x", "b", False)]
    assert watched.idle == []
    gateways.backend.allow()
    await read(first)
    await second.chunks.aclose()
    assert watched.idle == [False, True]
    await read(await cached.generate(generation("c", tenant="x")))  # at once, from memory
    assert watched.seen[-1] == ("x", "c", True)
    await cached.infer(inference(), "asked")  # is no sequence, and yet a load
    await read(await cached.generate(generation(), "asked"))
    assert len(watched.seen) == 3
    assert watched.idle == [False, True] + [False, True] * 2


async def test_warming_stores_and_counts_for_nothing() -> None:
    gateways = Gateways(FakeSecondLevel())
    cached = gateways.open()
    watched = Watched(cached)
    gateways.backend.allow()
    await cached.warm(generation("ahead"))
    await cached.warm(inference("ahead"))
    assert (watched.seen, watched.idle, outcomes(cached)) == ([], [], {})
    hit = await cached.generate(generation("real"))
    assert (hit.outcome, hit.response_id) == ("hit", "ahead")
    assert tokens(await read(hit)) == [0, 1, 2, 3]
    assert (await cached.infer(inference())).outcome == "hit"
    assert gateways.second.puts == 2


async def test_what_is_warmed_is_joined_and_may_be_given_up() -> None:
    gateways = Gateways()
    cached = gateways.open()
    warming = asyncio.create_task(cached.warm(generation("ahead", priority=0.0)))
    await settle()
    real = asyncio.create_task(ask(cached, generation("real")))
    await settle()
    warming.cancel()
    gateways.backend.allow()
    assert (await real)[1] == [0, 1, 2, 3]
    assert [request.priority for request in gateways.backend.generations] == [0.0, 0.5]
    alone = asyncio.create_task(cached.warm(generation("ahead", max_tokens=2)))
    await asyncio.sleep(0)
    alone.cancel()
    await asyncio.gather(alone, warming, return_exceptions=True)
    await eventually(lambda: not cached._flights)


async def test_the_prefetcher_learns_from_requests_and_computes_ahead() -> None:
    gateways = Gateways()
    gateways.backend.allow()
    cached = gateways.open()
    limits = PrefetchLimits(enabled=True, min_occurrences=2, max_time_share=1.0, max_per_minute=1000)
    prefetcher = Prefetcher(limits, cached.warm, cached.is_idle, cached.cache.__contains__)
    cached.watcher = prefetcher
    prefetcher.start()
    for _ in range(4):
        for value in (1.0, 2.0):
            await cached.infer(inference(str(value), value))
    cached.flush()
    await cached.infer(inference("first", 1.0))
    await eventually(lambda: prefetcher.statistics().warmed)
    assert (await cached.infer(inference("second", 2.0))).outcome == "hit"
    assert prefetcher.statistics().useful == 1
    await prefetcher.close()


# Flushes


async def test_a_flush_forgets_what_it_names() -> None:
    gateways = Gateways()
    gateways.backend.allow()
    cached = gateways.open()
    for tenant in "ab":
        await ask(cached, generation(tenant=tenant))
    assert cached.flush(tenant="a") == 1
    assert cached.flush(model="another") == 0
    assert [(await ask(cached, generation(tenant=tenant)))[0] for tenant in "ab"] == ["miss", "hit"]
    assert cached.flush(model=MODEL.name) == 2
    assert cached.statistics().memory.flushed == 3


@pytest.mark.parametrize("second", [False, True])
async def test_what_is_under_way_when_a_flush_comes_is_given_and_not_stored(second: bool) -> None:
    gateways = Gateways(FakeSecondLevel() if second else None)
    cached = gateways.open()
    before = await cached.generate(generation("before"))
    gateways.backend.allow(1)
    await anext(before.chunks)
    cached.flush()
    after = await cached.generate(generation("after"))
    assert (after.outcome, after.response_id) == ("miss", "after")  # not an answer of before the flush
    gateways.backend.allow()
    assert (tokens(await read(before)), tokens(await read(after))) == ([1, 2, 3], [0, 1, 2, 3])
    stored = await cached.generate(generation())
    assert (stored.outcome, stored.response_id) == ("hit", "after")
    await stored.chunks.aclose()
    if second:
        assert gateways.second.puts == 1
        assert gateways.second.forgotten == [(None, None)]


async def test_a_flush_of_another_leaves_what_is_under_way() -> None:
    gateways = Gateways()
    cached = gateways.open()
    answer = await cached.generate(generation("mine", tenant="a"))
    cached.flush(tenant="b")
    gateways.backend.allow()
    await read(answer)
    assert (await ask(cached, generation(tenant="a")))[0] == "hit"


async def test_a_flush_during_the_lookup_keeps_the_old_answer_out() -> None:
    gateways = Gateways(FakeSecondLevel())
    gateways.backend.allow()
    await ask(gateways.open())
    cached = gateways.open()
    gateways.second.gate.clear()
    asking = asyncio.create_task(ask(cached))
    await settle()
    cached.flush()
    gateways.second.gate.set()
    assert await asking == ("hit", [0, 1, 2, 3])  # asked before the flush
    assert cached.statistics().memory.entries == 0


async def test_a_computation_of_before_a_flush_elsewhere_is_not_found() -> None:
    gateways = Gateways(FakeSecondLevel())
    slow, other = gateways.open(), gateways.open()
    answer = await slow.generate(generation("before"))
    await gateways.second.flush()  # the broadcast has not come to this gateway yet
    gateways.backend.allow()
    await read(answer)
    assert (await ask(other))[0] == "miss"


async def test_a_second_level_that_is_away_cannot_be_flushed_silently() -> None:
    second = FakeSecondLevel()
    second.away = True
    with pytest.raises(UnavailableError):
        await second.flush()


@pytest.mark.parametrize("seed", range(4))
async def test_nobody_is_wronged_whatever_happens(seed: int) -> None:
    """Comings, goings, priorities, failures, flushes and a second level, all at once."""
    chance = random.Random(seed)
    gateways = Gateways(FakeSecondLevel())
    backend, caches = gateways.backend, [gateways.open(), gateways.open()]
    whole = 0

    async def reader(cached: CachedBackend, request: GenerateRequest, patience: int) -> None:
        nonlocal whole
        answer = await cached.generate(request)
        seen: list[TokenChunk] = []
        try:
            async for chunk in answer.chunks:
                seen.append(chunk)
                if len(seen) > patience:
                    return
        finally:
            await answer.chunks.aclose()
        assert tokens(seen) == list(range(request.sampling.max_tokens))
        whole += 1

    readers = []
    for n in range(200):
        request = generation(str(n), max_tokens=chance.randrange(1, 4), priority=chance.random())
        readers.append(asyncio.create_task(reader(chance.choice(caches), request, chance.choice([0, 1, 99, 99]))))
        for _ in range(chance.choice([0, 0, 1, 3])):
            await asyncio.sleep(0)
        if chance.random() < 0.2:
            chance.choice(readers).cancel()
        if chance.random() < 0.1:
            backend.failures.append(OverloadedError("now and then"))
        if chance.random() < 0.1:
            await gateways.second.flush()
            chance.choice(caches).flush()
        if chance.random() < 0.2:
            gateways.second.gate.clear() if gateways.second.gate.is_set() else gateways.second.gate.set()
        backend.allow(1)
    backend.failures.clear()
    gateways.second.gate.set()
    backend.allow()
    ends = await within_patience(asyncio.gather(*readers, return_exceptions=True))
    assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError, OverloadedError}
    assert whole > 20
    await eventually(lambda: backend.closed == len(backend.generations))
    assert [cached._flights for cached in caches] == [{}, {}]
