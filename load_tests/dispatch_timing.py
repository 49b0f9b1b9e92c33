"""Seconds of dispatches over lanes, that really went there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pimoe.runtime.routing.dispatch import Dispatcher
from rounds import timed, warm_up_calls

_LANES_TIMEOUT_S = 30.0
_ATTEMPTS = 3


async def timed_over_lanes(
    dispatcher: Dispatcher, dispatch: Callable[[], Awaitable[object]], calls: int, warm_up: int | None = None
) -> list[float]:
    """As `timed`, of dispatches of `dispatcher` that all went over lanes; measured again where one did not, as a
    lane was late or failed and closed.

    Raises:
        RuntimeError: that happened each time.
        TimeoutError: no lanes open.
    """
    wanted = calls + (warm_up_calls(calls) if warm_up is None else warm_up)
    went = []
    for _ in range(_ATTEMPTS):
        await _until_over_lanes(dispatcher, dispatch)
        before = dispatcher.statistics().over_lanes
        times = await timed(dispatch, calls, warm_up)
        went.append(dispatcher.statistics().over_lanes - before)
        if went[-1] == wanted:
            return times
    raise RuntimeError(f"of {wanted} dispatches {went} went over lanes, the others over links")


async def _until_over_lanes(dispatcher: Dispatcher, dispatch: Callable[[], Awaitable[object]]) -> None:
    """Lanes open in the background, with the first dispatches, and again after they failed."""
    before = dispatcher.statistics().over_lanes
    async with asyncio.timeout(_LANES_TIMEOUT_S):
        while dispatcher.statistics().over_lanes == before:
            await dispatch()
            await asyncio.sleep(0.01)
