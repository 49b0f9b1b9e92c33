"""Several coroutines at once, of which all must succeed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

R = TypeVar("R")


async def gather_or_cancel(calls: Sequence[Coroutine[Any, Any, R]]) -> list[R]:
    """Their results, in order. When one fails, or the caller is cancelled, the others are cancelled and have ended
    before this returns, so that nothing goes on behind the caller's back.

    Raises: the first error as it is; a task group would wrap it.
    """
    if len(calls) == 1:
        return [await calls[0]]  # no task: many dispatches go to one group only
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
