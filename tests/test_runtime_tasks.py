"""Several coroutines of which all must succeed."""

from __future__ import annotations

import asyncio

import pytest
from pimoe.runtime.tasks import gather_or_cancel


async def value(number: int) -> int:
    await asyncio.sleep(0)
    return number


@pytest.mark.parametrize("count", [0, 1, 5])
async def test_results_come_in_order(count: int) -> None:
    assert await gather_or_cancel([value(n) for n in range(count)]) == list(range(count))


async def test_one_call_runs_without_a_task() -> None:
    async def current() -> asyncio.Task[object] | None:
        return asyncio.current_task()

    assert await gather_or_cancel([current()]) == [asyncio.current_task()]


async def test_the_first_error_comes_as_it_is_after_the_others_have_ended() -> None:
    ended = []

    async def waiting(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    async def failing() -> None:
        await asyncio.sleep(0)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await gather_or_cancel([waiting("a"), failing(), waiting("b")])
    assert sorted(ended) == ["a", "b"]


async def test_an_error_while_others_are_cancelled_does_not_hide_the_first() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("second")

    async def failing() -> None:
        await asyncio.sleep(0)
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        await gather_or_cancel([stubborn(), failing()])
