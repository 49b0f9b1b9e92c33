"""The batcher after its expectations turned out wrong, in virtual time: it serves again, and learns better."""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest
from pimoe.runtime.batching import Batcher, BatchLimits, Computed, QueueLimits

T = TypeVar("T")

FULL = 4096


class Jumping(selectors.SelectSelector):
    """Lets the clock jump to what is due next instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and nothing is left to happen"
        self.now += max(0.0, timeout) + 1e-9
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def virtually(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


class Served:
    """A batcher in front of experts that take one batch at a time, each as long as `seconds` of its tokens."""

    def __init__(self, seconds: Callable[[int], float], limits: BatchLimits, queue_limits: QueueLimits) -> None:
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        self.batches: list[list[tuple[str, int]]] = []
        self._experts = asyncio.Lock()
        self.batcher: Batcher[tuple[str, int], str] = Batcher(
            self._execute, limits, queue_limits, self.loop.time, servers=lambda: 1
        )

    async def _execute(self, batch: Sequence[tuple[str, int]], deadline: float) -> Computed[str]:
        self.batches.append(list(batch))
        async with self._experts:
            await asyncio.sleep(self.seconds(sum(tokens for _, tokens in batch)))
        return Computed([name for name, _ in batch])

    @property
    def model(self) -> Any:
        return self.batcher.downstream.latency

    async def call(
        self, tokens: int, timeout_s: float, priority: float = 0.5, name: str = "", group: object = None
    ) -> str:
        """What became of one request: "served", or the error."""
        try:
            await self.batcher.submit((name, tokens), tokens, priority, timeout_s, group)
        except Exception as error:
            return type(error).__name__
        return "served"

    async def calls(self, count: int, tokens: int, timeout_s: float) -> Counter[str]:
        """What became of so many at once."""
        return Counter(await asyncio.gather(*(self.call(tokens, timeout_s) for _ in range(count))))

    async def one_by_one(self, sizes: Sequence[int], timeout_s: float = 60.0) -> None:
        """Each alone, and all served."""
        for tokens in sizes:
            assert await self.call(tokens, timeout_s) == "served"


@contextlib.asynccontextmanager
async def served(
    seconds: Callable[[int], float], queue_limits: QueueLimits | None = None, **limits: Any
) -> AsyncIterator[Served]:
    made = Served(seconds, BatchLimits(**{"max_batch_tokens": FULL, **limits}), queue_limits or QueueLimits())
    made.batcher.start()
    try:
        yield made
    finally:
        await made.batcher.close()


@pytest.mark.parametrize("tokens", [1, 64, FULL])
def test_slow_batches_do_not_turn_everything_away_for_good(tokens: int) -> None:
    async def scenario() -> None:
        async with served(lambda tokens: 2.0) as s:
            await s.one_by_one([tokens] * 9)
            assert s.model.predict_s(tokens) == pytest.approx(2.0)
            s.seconds = lambda tokens: 0.01
            await s.one_by_one([tokens] * 40, timeout_s=1.0)  # of which the first is expected to take two
            assert len(s.batches) == 49
            assert s.model.predict_s(tokens) < 0.1

    virtually(scenario())


def test_bursts_are_served_again_once_downstream_is_fast() -> None:
    async def scenario() -> None:
        async with served(lambda tokens: 2.0) as s:
            await s.one_by_one([64] * 9)
            s.seconds = lambda tokens: 0.01
            outcomes = [await s.calls(200, 64, 1.0) for _ in range(40)]
            assert outcomes[0]["served"] >= FULL // 64  # what is idle tries a batch
            assert outcomes[-1] == {"served": 200}

    virtually(scenario())


@pytest.mark.parametrize("count", [1, 50])
def test_of_small_batches_nothing_is_said_by_those_that_knew_only_full_ones(count: int) -> None:
    async def scenario() -> None:
        async with served(lambda tokens: tokens / FULL) as s:
            await s.one_by_one([FULL] * 20)
            assert s.model.trusted
            assert await s.calls(count, 1, 0.3) == {"served": count}

    virtually(scenario())


@pytest.mark.parametrize("seed", range(5))
def test_a_model_of_tiny_batches_turns_no_burst_away(seed: int) -> None:
    chance = random.Random(seed)

    async def scenario() -> None:
        async with served(lambda tokens: (0.01 + 1e-6 * tokens) * chance.uniform(0.3, 1.7)) as s:
            await s.one_by_one([chance.randint(1, 4) for _ in range(60)])
            assert s.model.trusted
            before = asyncio.create_task(s.call(1, 1.0))  # while something runs newcomers may be refused
            await asyncio.sleep(0.001)
            assert await s.calls(400, 64, 1.0) == {"served": 400}
            assert await before == "served"

    virtually(scenario())


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("timeout_s", [0.1, 0.5, 1.0])
def test_a_batch_that_waits_for_company_goes_before_its_deadline(trusted: bool, timeout_s: float) -> None:
    async def scenario() -> None:
        async with served(lambda tokens: 0.005, min_batch_tokens=64, max_wait_s=1.0) as s:
            if trusted:
                await s.one_by_one([64] * 20)
            assert s.model.trusted is trusted
            began = s.loop.time()
            assert await s.call(1, timeout_s) == "served"
            assert began < s.loop.time() < began + timeout_s

    virtually(scenario())


@pytest.mark.parametrize("known", [True, False])
def test_after_a_standstill_nobody_is_shed_where_little_waits(known: bool) -> None:
    async def scenario() -> None:
        limits = QueueLimits(target_delay_s=2.0, standing_s=0.1)
        async with served(lambda tokens: 0.05, limits, max_batch_tokens=8, max_in_flight=1) as s:
            await s.one_by_one([8] * (20 if known else 2))
            s.seconds = lambda tokens: 20.0
            calls = [asyncio.create_task(s.call(8, 600.0))]
            await asyncio.sleep(1.0)
            s.seconds = lambda tokens: 0.05
            for n in range(40):
                calls.append(asyncio.create_task(s.call(2, 600.0, priority=n % 5 / 4)))
            assert Counter(await asyncio.gather(*calls)) == {"served": 41}

    virtually(scenario())


def test_where_much_waits_somebody_is_shed() -> None:
    """The test above is not empty."""

    async def scenario() -> None:
        limits = QueueLimits(target_delay_s=2.0, standing_s=0.1)
        async with served(lambda tokens: 0.05, limits, max_batch_tokens=8, max_in_flight=1) as s:
            await s.one_by_one([8] * 20)
            outcomes = await asyncio.gather(*(s.call(2, 600.0, priority=n % 5 / 4) for n in range(1000)))
            assert Counter(outcomes)["OverloadedError"] > 100

    virtually(scenario())


def test_groups_under_overload_share_what_there_is() -> None:
    async def scenario() -> None:
        limits = QueueLimits(target_delay_s=5.0, class_shares=(1.0,) * 5)
        outcomes: dict[str, Counter[str]] = {"low": Counter(), "high": Counter()}

        async def call(name: str, priority: float) -> None:
            outcomes[name][await s.call(1, 60.0, priority, name, group=name)] += 1

        async with served(lambda tokens: 0.1, limits, max_batch_tokens=8, max_in_flight=1) as s:
            async with asyncio.TaskGroup() as callers:
                for _ in range(600):  # one and a half times what can be done
                    for name, priority in (("low", 0.0), ("high", 1.0)):
                        for _ in range(6):
                            callers.create_task(call(name, priority))
                    await asyncio.sleep(0.1)
            assert all(len({name for name, _ in batch}) == 1 for batch in s.batches)
        assert outcomes["high"]["served"] > 0.9 * 3600
        assert outcomes["low"]["served"] > 3600 / 20

    virtually(scenario())
