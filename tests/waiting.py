"""Waiting for conditions, and a watch over what a test leaves behind. No test sleeps for a fixed time."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

_PATIENCE_S = 10.0  # only ever spent by a test that fails


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition()` holds; fail the test when it does not come to hold."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while not condition():  # noqa: ASYNC110 (conditions of foreign objects have no event)
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail("the condition did not come to hold")


async def within_patience(awaitable: Any) -> Any:
    """What `awaitable` gives; a failure instead of a hanging test run."""
    async with asyncio.timeout(_PATIENCE_S):
        return await awaitable


@functools.cache
def leave_modules_to_themselves() -> None:
    """Looking through all that torch and others defined would be most of a run: leave it out of collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture
async def nothing_left_behind() -> AsyncIterator[None]:
    """Fails a test after which tasks run on, or asyncio complains (of futures whose exception nobody saw)."""
    leave_modules_to_themselves()
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    before = asyncio.all_tasks()
    yield
    own = asyncio.current_task()
    await eventually(lambda: not asyncio.all_tasks() - before - {own})
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []
