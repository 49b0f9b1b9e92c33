"""Rivals: a more urgent equal request is computed beside the one under way, and nobody is worse off for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cache_backend import Backend, Refused, generation, inference, tokens
from fake_second_level import FakeSecondLevel
from pimoe.runtime.caching import CachedBackend, CacheLimits, ResultCache
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError, PimoeError, UnavailableError
from pimoe.runtime.requests import GenerateAnswer, GenerateRequest, InferAnswer, InferResult, TokenChunk
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TINY_S = 0.02
SLOW, MIDDLE, URGENT = 0.1, 0.5, 0.9
OTHER = {SLOW: URGENT, URGENT: SLOW}


class Racing(Backend):
    """Each computation takes a step, or fails, when the test says so, told apart by priority."""

    def __init__(self) -> None:
        super().__init__()
        self._orders: dict[float, asyncio.Queue[PimoeError | None]] = {}
        self.gone: list[float] = []

    def step(self, priority: float, steps: int = 1) -> None:
        """Let the computation of that priority go on."""
        for _ in range(steps):
            self._of(priority).put_nowait(None)

    def fail(self, priority: float, error: PimoeError) -> None:
        """Let it fail."""
        self._of(priority).put_nowait(error)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self.generations.append(request)
        try:
            for token in range(request.sampling.max_tokens):
                await self._turn(request.priority)
                yield TokenChunk((token,), "length" if token == request.sampling.max_tokens - 1 else None)
        finally:
            self._left(request.priority)

    async def infer(self, request: Any) -> InferResult:
        self.inferences.append(request)
        try:
            await self._turn(request.priority)
        finally:
            self._left(request.priority)
        return InferResult(request.hidden_states)

    def _of(self, priority: float) -> asyncio.Queue[PimoeError | None]:
        return self._orders.setdefault(priority, asyncio.Queue())

    def _left(self, priority: float) -> None:
        self.closed += 1
        self.gone.append(priority)

    async def _turn(self, priority: float) -> None:
        if (error := await self._of(priority).get()) is not None:
            raise error


class Race:
    """A cache before a `Racing` backend."""

    def __init__(self, second: Any = None) -> None:
        self.backend = Racing()
        cache: Any = ResultCache(CacheLimits())
        seconds = iter(range(1000, 2000))
        self.cached = CachedBackend(self.backend, cache, second, wall_clock=lambda: next(seconds))

    async def infer(self, name: str, priority: float, timeout_s: float = 20.0) -> asyncio.Task[InferAnswer]:
        """Ask for the tensor, and wait until it is asked."""
        request = replace(inference(name, timeout_s=timeout_s), priority=priority)
        task = asyncio.create_task(self.cached.infer(request))
        await settle()
        return task

    async def generate(self, name: str, priority: float, **options: Any) -> GenerateAnswer:
        """Ask for the generation."""
        answer = await self.cached.generate(generation(name, priority=priority, **options))
        await settle()
        return answer

    @property
    def priorities(self) -> list[float]:
        """Of what was computed."""
        return [request.priority for request in (*self.backend.generations, *self.backend.inferences)]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def read(answer: GenerateAnswer) -> list[int]:
    return tokens([chunk async for chunk in answer.chunks])


def reading(*answers: GenerateAnswer) -> list[asyncio.Task[list[int]]]:
    return [asyncio.create_task(read(answer)) for answer in answers]


# Who wins


async def test_a_nearly_finished_computation_is_not_lost_to_an_urgent_one() -> None:
    race = Race()
    leader = await race.infer("leader", MIDDLE, timeout_s=1.5)
    urgent = await race.infer("urgent", URGENT, timeout_s=0.8)
    assert race.priorities == [MIDDLE, URGENT]
    assert race.backend.gone == []
    race.backend.step(MIDDLE)
    answers = await within_patience(asyncio.gather(leader, urgent))
    assert [answer.outcome for answer in answers] == ["miss", "miss"]
    assert answers[0].result is answers[1].result
    await eventually(lambda: race.backend.gone == [MIDDLE, URGENT])
    assert race.cached.statistics().superseded == 1
    assert race.cached._flights == {}
    assert (await race.cached.infer(inference("later"))).outcome == "hit"


@pytest.mark.parametrize("winner", [SLOW, URGENT])
async def test_whichever_begins_first_goes_on_for_the_readers_of_both(winner: float) -> None:
    race = Race()
    slow = [await race.generate(f"slow-{n}", SLOW) for n in range(3)]
    urgent = await race.generate("urgent", URGENT)
    assert (urgent.outcome, urgent.response_id, urgent.created_s) == ("miss", "slow-0", slow[0].created_s)
    tasks = reading(*slow, urgent)
    race.backend.step(winner)
    await eventually(lambda: len(race.backend.gone) == 1)
    assert race.backend.gone == [OTHER[winner]]
    late = await race.generate("late", 1.0)  # it has begun: join, however urgent
    assert (late.outcome, late.response_id) == ("coalesced", "slow-0")
    tasks += reading(late)
    race.backend.step(winner, 3)
    assert await within_patience(asyncio.gather(*tasks)) == [[0, 1, 2, 3]] * 5
    assert race.priorities == [SLOW, URGENT]
    hit = await race.generate("later", 1.0)
    assert (hit.outcome, hit.response_id, await read(hit)) == ("hit", "slow-0", [0, 1, 2, 3])


async def test_two_that_begin_at_once_give_no_item_twice() -> None:
    race = Race()
    answers = [await race.generate(str(priority), priority) for priority in (SLOW, MIDDLE, URGENT)]
    tasks = reading(*answers)
    await settle()
    for priority in (SLOW, MIDDLE, URGENT):
        race.backend.step(priority, 4)
    assert await within_patience(asyncio.gather(*tasks)) == [[0, 1, 2, 3]] * 3
    await eventually(lambda: race.backend.closed == 3)
    assert race.cached.statistics().memory.entries == 1


async def test_slowly_rising_priorities_are_computed_once_for_each_class() -> None:
    race = Race()
    rising = [0.0, 0.1, 0.2, 0.3, 0.45, 0.5, 0.65, 0.7, 0.8, 0.9, 1.0]
    tasks = [await race.infer(str(priority), priority) for priority in rising]
    assert race.priorities == [0.0, 0.2, 0.45, 0.65, 0.8]
    race.backend.step(0.45)
    answers = await within_patience(asyncio.gather(*tasks))
    assert len({id(answer.result) for answer in answers}) == 1
    await eventually(lambda: race.backend.closed == 5)
    statistics = race.cached.statistics()
    assert (statistics.superseded, statistics.memory.entries) == (4, 1)
    assert {name: count for name, count in statistics.outcomes.items() if count} == {"miss": 5, "coalesced": 6}


async def test_newcomers_read_the_most_urgent_one_that_runs() -> None:
    race = Race()
    slow, urgent = await race.infer("slow", SLOW), await race.infer("urgent", URGENT)
    late = await race.infer("late", SLOW)
    slow.cancel()  # nobody is left there
    await eventually(lambda: race.backend.gone == [SLOW])
    urgent.cancel()
    await settle()
    assert race.backend.gone == [SLOW]  # somebody is left here
    race.backend.step(URGENT)
    assert (await late).outcome == "coalesced"
    assert race.priorities == [SLOW, URGENT]


async def test_the_winner_is_not_ended_by_who_leaves_before_the_others_have_moved() -> None:
    race = Race()
    slow, urgent = await race.generate("slow", SLOW), await race.generate("urgent", URGENT)
    task = asyncio.create_task(anext(urgent.chunks))
    await settle()
    race.backend.step(URGENT)
    await task
    await urgent.chunks.aclose()  # `slow` has not read anything yet
    await settle()
    assert race.backend.gone == [SLOW]
    race.backend.step(URGENT, 3)
    assert await within_patience(read(slow)) == [0, 1, 2, 3]
    assert race.priorities == [SLOW, URGENT]


async def test_a_computation_that_does_not_heed_its_end_gives_nothing() -> None:
    race = Race()
    heedless, gate = asyncio.Event(), asyncio.Event()

    async def generate(request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        if request.priority == SLOW:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                heedless.set()
            yield TokenChunk((9,), "length")
        for token in range(4):
            yield TokenChunk((token,), "length" if token == 3 else None)
            await gate.wait()

    race.backend.generate = generate  # type: ignore[method-assign]
    slow, urgent = await race.generate("slow", SLOW), await race.generate("urgent", URGENT)
    tasks = reading(slow, urgent)
    await eventually(heedless.is_set)
    await settle()  # now it has given its item, too late
    gate.set()
    assert await within_patience(asyncio.gather(*tasks)) == [[0, 1, 2, 3]] * 2
    assert await read(await race.generate("later", SLOW)) == [0, 1, 2, 3]


# Who fails


@pytest.mark.parametrize(
    "error", [DeadlineExceededError("its own"), OverloadedError("full"), UnavailableError("away"), Refused("no")]
)
@pytest.mark.parametrize("failing", [SLOW, URGENT])
async def test_one_that_fails_fails_for_its_leader_alone(error: PimoeError, failing: float) -> None:
    race = Race()
    leaders = {SLOW: await race.infer("slow", SLOW)}
    beside = [await race.infer("slow too", SLOW)]
    leaders[URGENT] = await race.infer("urgent", URGENT)
    beside.append(await race.infer("urgent too", URGENT))
    race.backend.fail(failing, error)
    await settle()
    with pytest.raises(type(error)):
        await leaders.pop(failing)
    late = await race.infer("late", URGENT)  # joins, lest everyone of its class fail in turn
    assert race.priorities == [SLOW, URGENT]
    race.backend.step(OTHER[failing])
    answers = await within_patience(asyncio.gather(*leaders.values(), *beside, late))
    assert [answer.outcome for answer in answers] == ["miss", "coalesced", "coalesced", "coalesced"]
    assert (await race.cached.infer(inference("later"))).outcome == "hit"


async def test_an_urgent_one_with_little_time_fails_alone() -> None:
    race = Race()
    leader = await race.infer("leader", MIDDLE)
    urgent = await race.infer("urgent", URGENT, timeout_s=TINY_S)
    with pytest.raises(DeadlineExceededError):
        await urgent
    await eventually(lambda: race.backend.gone == [URGENT])  # nobody is left there
    race.backend.step(MIDDLE)
    assert (await within_patience(leader)).outcome == "miss"
    assert race.priorities == [MIDDLE, URGENT]


async def test_where_all_fail_the_rest_begin_anew() -> None:
    race = Race()
    answers = [await race.generate(f"{priority}-{n}", priority) for priority in (SLOW, URGENT) for n in range(2)]
    tasks = reading(*answers)
    await settle()
    for priority in (URGENT, SLOW):
        race.backend.fail(priority, OverloadedError("full"))
    await eventually(lambda: len(race.priorities) > 2)
    for priority in (SLOW, URGENT):
        race.backend.step(priority, 4)
    ends = await within_patience(asyncio.gather(*tasks, return_exceptions=True))
    assert [type(end) for end in ends] == [OverloadedError, list, OverloadedError, list]
    hit = await race.generate("later", SLOW)
    assert (hit.outcome, hit.response_id, await read(hit)) == ("hit", f"{SLOW}-0", [0, 1, 2, 3])
    assert race.cached._flights == {}


async def test_a_winner_that_fails_in_the_middle_is_begun_anew_for_those_it_superseded() -> None:
    race = Race()
    slow, urgent = await race.generate("slow", SLOW), await race.generate("urgent", URGENT)
    following, leading = reading(slow, urgent)
    await settle()
    race.backend.step(URGENT, 2)
    race.backend.fail(URGENT, DeadlineExceededError("its own"))
    with pytest.raises(DeadlineExceededError):
        await leading
    race.backend.step(SLOW, 4)
    assert await within_patience(following) == [0, 1, 2, 3]
    assert race.priorities == [SLOW, URGENT, SLOW]


async def test_a_place_that_was_given_up_may_be_taken_again() -> None:
    race = Race()
    slow, urgent = await race.infer("slow", SLOW), await race.infer("urgent", URGENT)
    urgent.cancel()
    await eventually(lambda: race.backend.gone == [URGENT])
    again = await race.infer("again", URGENT)
    assert race.priorities == [SLOW, URGENT, URGENT]
    race.backend.step(URGENT)
    assert [answer.outcome for answer in await within_patience(asyncio.gather(slow, again))] == ["miss"] * 2


async def test_an_urgent_request_that_is_refused_at_once_disturbs_nobody() -> None:
    race = Race()
    slow = await race.generate("slow", SLOW)
    computing = race.backend.generate

    def refuse(request: GenerateRequest) -> Any:
        raise Refused("no")

    race.backend.generate = refuse  # type: ignore[method-assign]
    with pytest.raises(Refused):
        await race.generate("urgent", URGENT)
    race.backend.generate = computing  # type: ignore[method-assign]
    race.backend.step(SLOW, 4)
    assert await within_patience(read(slow)) == [0, 1, 2, 3]
    assert race.cached.statistics().superseded == 0


# Flushes and the second level


@pytest.mark.parametrize("winner", [SLOW, URGENT])
async def test_after_a_flush_no_rival_is_stored_or_joined(winner: float) -> None:
    race = Race(FakeSecondLevel())
    before = [await race.infer("slow", SLOW), await race.infer("urgent", URGENT)]
    race.cached.flush()
    after = await race.infer("after", MIDDLE)
    assert race.priorities == [SLOW, URGENT, MIDDLE]
    race.backend.step(winner)
    await within_patience(asyncio.gather(*before))
    assert race.cached.statistics().memory.entries == 0
    assert not after.done()
    race.backend.step(MIDDLE)
    assert (await within_patience(after)).outcome == "miss"
    assert (race.cached.statistics().memory.entries, race.cached.second.puts) == (1, 1)  # type: ignore[union-attr]


async def test_after_a_flush_readers_of_before_keep_to_each_other() -> None:
    race = Race()
    slow, urgent = await race.infer("slow", SLOW), await race.infer("urgent", URGENT)
    follower = await race.infer("follower", SLOW)
    race.cached.flush()
    race.backend.fail(URGENT, OverloadedError("full"))
    with pytest.raises(OverloadedError):
        await urgent
    race.backend.step(SLOW)
    await within_patience(asyncio.gather(slow, follower))
    assert race.priorities == [SLOW, URGENT]
    assert race.cached.statistics().memory.entries == 0


@pytest.mark.parametrize("winner", [SLOW, URGENT])
async def test_the_winner_is_put_into_the_second_level_once(winner: float) -> None:
    second = FakeSecondLevel()
    race = Race(second)
    tasks = [await race.infer("slow", SLOW), await race.infer("urgent", URGENT)]
    assert race.priorities == [SLOW, URGENT]
    race.backend.step(winner)
    await within_patience(asyncio.gather(*tasks))
    assert (second.lookups, second.puts) == (1, 1)
    assert (await Race(second).cached.infer(inference("elsewhere"))).outcome == "hit"


# All at once


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_has_time_gets_everything_once(seed: int) -> None:
    chance = random.Random(seed)
    second = FakeSecondLevel()
    race = Race(second if seed % 2 else None)
    classes = (0.05, 0.25, 0.5, 0.75, 0.95)
    tasks: list[asyncio.Task[list[int]]] = []
    most = 0
    for n in range(250):
        request = generation(str(n), max_tokens=chance.randrange(1, 6), priority=chance.choice(classes))

        async def ask(request: GenerateRequest = request) -> list[int]:
            read_tokens = await read(await race.cached.generate(request))
            assert read_tokens == list(range(request.sampling.max_tokens))
            return read_tokens

        tasks.append(asyncio.create_task(ask()))
        for _ in range(chance.choice([0, 0, 1, 4])):
            await asyncio.sleep(0)
        if chance.random() < 0.2:
            chance.choice(tasks).cancel()
        if chance.random() < 0.1:
            race.backend.fail(chance.choice(classes), chance.choice([OverloadedError, Refused])("now and then"))
        if chance.random() < 0.05:
            race.cached.flush()
        elif chance.random() < 0.4:
            race.cached.cache.clear()
            second.entries.clear()
        for group in race.cached._flights.values():
            most = max(most, sum(not rival.flight.is_done for rival in group.rivals))
        if chance.random() < 0.2:
            race.backend.step(chance.choice(classes), chance.choice([1, 3]))
    for priority in classes:
        race.backend.step(priority, 1000)
    ends = await within_patience(asyncio.gather(*tasks, return_exceptions=True))
    assert {type(end) for end in ends} <= {list, asyncio.CancelledError, OverloadedError, Refused}
    assert sum(isinstance(end, list) for end in ends) > 50
    assert most <= len(classes)
    assert race.cached.statistics().superseded > 10
    await eventually(lambda: race.backend.closed == len(race.backend.generations))
    assert race.cached._flights == {}


async def test_a_tensor_of_rivals_is_the_same_whoever_asked() -> None:
    race = Race()
    tasks = [await race.infer("slow", SLOW), await race.infer("urgent", URGENT)]
    race.backend.step(URGENT)
    answers = await within_patience(asyncio.gather(*tasks))
    assert all((np.frombuffer(answer.result.output.data, np.float32) == 1.0).all() for answer in answers)
