"""The dispatcher: a layer's tokens out to the expert groups and their sums back, within a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .plan import ExpertRows, Placement, combine, plan_dispatch
from .strategies import Routing


class GroupBackend(Protocol):
    """An expert group, wherever it is."""

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """The weighted sums `[rows, hidden]` in float32; `deadline` is on `loop.time()`.

        Raises:
            UnavailableError: no replica lived until the deadline.
            DeadlineExceededError: the time ran out.
        """
        ...


class DispatchStatistics(NamedTuple):
    """Since start: layers dispatched, rows sent to each group, pairs of token and expert computed for each
    expert, seconds spent waiting for groups. Expert counts are sums over requests: single ones would tell of
    prompts (arXiv 2602.04105)."""

    dispatches: int
    group_rows: tuple[int, ...]
    expert_pairs: tuple[int, ...]
    waiting_s: float


class Dispatcher:
    """Plans, sends and combines. One per router.

    Args:
        groups: one backend per group of `placement`, in its order.
    """

    def __init__(self, placement: Placement, groups: Sequence[GroupBackend]) -> None:
        self.placement = placement
        self.groups = groups
        self._dispatches = 0
        self._group_rows = [0] * len(groups)
        self._expert_pairs = np.zeros(placement.num_experts, np.int64)
        self._waiting_s = 0.0

    def until(self, deadline: float) -> BoundDispatch:
        """This dispatcher as a decoder's expert dispatch, with `deadline` (`loop.time()`) for every layer."""
        return BoundDispatch(self, deadline)

    async def run(self, layer: int, hidden: Tensor, routing: Routing, deadline: float) -> Tensor:
        """Send `hidden [tokens, hidden]` through its experts; their weighted sum in float32.

        Raises: as `GroupBackend.run`. The other groups' work is cancelled then.
        """
        plans = plan_dispatch(routing, self.placement)
        self._count(plans, routing)
        calls = [self.groups[plan.group].run(layer, plan.take(hidden), deadline) for plan in plans]
        started = time.monotonic()
        partials = await _gather(calls)
        self._waiting_s += time.monotonic() - started
        with torch.inference_mode():
            return combine(plans, partials, hidden)

    def _count(self, plans: Sequence[Any], routing: Routing) -> None:
        self._dispatches += 1
        ids = routing.expert_ids.cpu().numpy().ravel()
        self._expert_pairs += np.bincount(ids, minlength=self.placement.num_experts)
        for plan in plans:
            self._group_rows[plan.group] += len(plan.offsets) - 1

    def statistics(self) -> DispatchStatistics:
        """See `DispatchStatistics`."""
        pairs = tuple(self._expert_pairs.tolist())
        return DispatchStatistics(self._dispatches, tuple(self._group_rows), pairs, self._waiting_s)


async def _gather(calls: Sequence[Coroutine[Any, Any, Tensor]]) -> list[Tensor]:
    if len(calls) == 1:
        return [await calls[0]]  # no task: a third of a decode step's dispatches have one group only
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # of no effect on those that are done


class BoundDispatch:
    """A dispatcher with a deadline: what `Decoder.forward` calls once per MoE layer."""

    def __init__(self, dispatcher: Dispatcher, deadline: float) -> None:
        self._dispatcher = dispatcher
        self._deadline = deadline

    async def __call__(self, layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        """See `Dispatcher.run`."""
        return await self._dispatcher.run(layer, hidden, routing, self._deadline)
