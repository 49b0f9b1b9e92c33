"""The dispatcher: a layer's tokens out to the expert groups and their sums back, within a deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..native.lanes import LaneDispatch
from ..tasks import gather_or_cancel
from .plan import ExpertRows, GroupPlan, Placement, combine, plan_dispatch
from .strategies import Routing

_log = logging.getLogger(__name__)

# A replica that takes longer for a small dispatch hangs, or its machine does; links know what to do then.
_LANE_TIMEOUT_S, _LONGEST_LANE_TIMEOUT_S = 0.5, 5.0
_FADING = 0.99


class GroupBackend(Protocol):
    """An expert group, wherever it is."""

    @property
    def replicas(self) -> int:
        """How many dispatches it computes at once, at least 1."""
        ...

    @property
    def computed_s(self) -> float | None:
        """Seconds that it says it computed for this dispatcher so far; None where it computes in the thread that
        calls it, so that nothing can be done meanwhile."""
        ...

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """The weighted sums `[rows, hidden]` in float32; `deadline` is on `loop.time()`.

        Raises:
            UnavailableError: no replica lived until the deadline.
            DeadlineExceededError: the time ran out.
        """
        ...


class Sent(Protocol):
    """A dispatch under way."""

    def cancel(self) -> asyncio.Task[None] | None:
        """Give it up; what is returned ends when it has."""
        ...


@runtime_checkable
class SendingBackend(GroupBackend, Protocol):
    """A group whose answers need nobody to wait for each of them: a dispatch to several then costs no tasks."""

    def send(
        self, layer: int, rows: ExpertRows, deadline: float, done: Callable[[Tensor | BaseException], None]
    ) -> Sent:
        """As `run`, but under way when this returns; `done` is told the outcome, later, unless it is cancelled."""
        ...


class OpenLane(Protocol):
    """A socket over which a group computes dispatches natively, one at a time."""

    @property
    def descriptor(self) -> int | None:
        """Of the socket; None while there is none."""
        ...

    def close(self) -> None:
        """Ends it for good."""
        ...


@runtime_checkable
class LaneBackend(GroupBackend, Protocol):
    """A group that may be on this machine."""

    def lane(self) -> OpenLane | None:
        """To a replica that takes a dispatch now."""
        ...


class DispatchStatistics(NamedTuple):
    """Since start: layers dispatched, how many of them over lanes, rows sent to each group, pairs of token and
    expert computed for each expert, seconds spent waiting for groups."""

    dispatches: int
    over_lanes: int
    group_rows: tuple[int, ...]
    expert_pairs: tuple[int, ...]
    waiting_s: float

    def as_plain(self, per_expert: bool) -> dict[str, Any]:
        """Plain values for the status page. Single experts only where asked for: what each was given tells of
        prompts (arXiv 2602.04105), however it is summed, when few requests run."""
        plain = {**self._asdict(), "imbalance_ratio": self._imbalance()}
        if not per_expert:
            del plain["expert_pairs"]
        return plain

    def _imbalance(self) -> float:
        """Pairs of the most loaded expert over the mean; 1 is even."""
        total = sum(self.expert_pairs)
        return max(self.expert_pairs) * len(self.expert_pairs) / total if total else 1.0


class Dispatched(NamedTuple):
    """A layer's weighted sums, float32 `[tokens, hidden]`; the tokens of its most loaded expert, on which the time
    depends; and the seconds that its groups were waited for."""

    output: Tensor
    largest_expert_tokens: int
    waited_s: float


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
        sending = [group for group in groups if isinstance(group, SendingBackend)]
        self._sending = sending if len(sending) == len(groups) else None
        near = [group for group in groups if isinstance(group, LaneBackend)]
        self._near = near if len(near) == len(groups) else None
        self._lanes = LaneDispatch(placement.group_of, placement.local_of, len(groups))
        self._over_lanes = 0
        self._longest_s = 0.0  # that a small dispatch took lately

    def parallelism(self) -> int:
        """How many dispatches are computed at once: replicas of the group that has fewest."""
        return min((group.replicas for group in self.groups), default=1)

    def computed_s(self) -> list[float]:
        """Seconds that each group computed so far; empty where one of them computes in this thread."""
        told = [group.computed_s for group in self.groups]
        if None in told:
            return []
        lanes_s = (self._lanes.computed_ns / 1e9).tolist()
        return [(seconds or 0.0) + more for seconds, more in zip(told, lanes_s, strict=True)]

    def until(self, deadline: float, lanes: bool = False) -> BoundDispatch:
        """This dispatcher as a decoder's expert dispatch, with `deadline` (`loop.time()`) for every layer. `lanes`
        as in `run_counted`."""
        return BoundDispatch(self, deadline, lanes)

    async def run(self, layer: int, hidden: Tensor, routing: Routing, deadline: float) -> Tensor:
        """Send `hidden [tokens, hidden]` through its experts; their weighted sum in float32.

        Raises: as `GroupBackend.run`. The other groups' work is cancelled then.
        """
        return (await self.run_counted(layer, hidden, routing, deadline)).output

    async def run_counted(
        self, layer: int, hidden: Tensor, routing: Routing, deadline: float, lanes: bool = False
    ) -> Dispatched:
        """As `run`, with what it cost.

        Args:
            lanes: whether a small dispatch may go over lanes, where there are any: faster, but this thread does
                nothing else until the sums are there.
        """
        if lanes and (done := self._run_on_lanes(layer, hidden, routing, deadline)) is not None:
            return done
        plans = plan_dispatch(routing, self.placement)
        largest = self._count(routing, plans)
        started = time.monotonic()
        if self._sending is None:
            calls = [self.groups[plan.group].run(layer, plan.take(hidden), deadline) for plan in plans]
            partials = await gather_or_cancel(calls)
        else:
            partials = await _send_all(self._sending, layer, hidden, plans, deadline)
        waited_s = time.monotonic() - started
        self._waiting_s += waited_s
        if lanes and self._lanes.takes(hidden, routing.expert_ids, routing.weights):
            # Perhaps one that a lane was too impatient for.
            self._longest_s = max(waited_s, _FADING * self._longest_s)
        with torch.inference_mode():
            return Dispatched(combine(plans, partials, hidden), largest, waited_s)

    def _lane_limit_s(self) -> float:
        """After so long a lane hangs: far above what dispatches took lately, which the size of experts decides."""
        return min(_LONGEST_LANE_TIMEOUT_S, max(_LANE_TIMEOUT_S, 4 * self._longest_s))

    def _run_on_lanes(self, layer: int, hidden: Tensor, routing: Routing, deadline: float) -> Dispatched | None:
        """None where it has to go over links."""
        if self._near is None or not self._lanes.takes(hidden, routing.expert_ids, routing.weights):
            return None
        lanes = [group.lane() for group in self._near]  # all are asked, so that all open
        open_lanes = [lane for lane in lanes if lane is not None and lane.descriptor is not None]
        sockets = [descriptor for lane in open_lanes if (descriptor := lane.descriptor) is not None]
        started = time.monotonic()
        limit_s = self._lane_limit_s()
        # Who has less time than that must not look like a lane that hangs, and end it for all.
        if len(sockets) < len(lanes) or deadline - started < limit_s:
            return None
        sums = self._lanes(sockets, layer, hidden, routing.expert_ids, routing.weights, limit_s)
        if sums is None:
            _log.warning("a lane failed or was late; its dispatch goes over links")
            for lane in open_lanes:
                lane.close()
            return None
        waited_s = time.monotonic() - started
        self._longest_s = max(waited_s, _FADING * self._longest_s)
        self._dispatches += 1
        self._over_lanes += 1
        self._waiting_s += waited_s
        return Dispatched(*sums, waited_s)

    def _count(self, routing: Routing, plans: Sequence[GroupPlan]) -> int:
        self._dispatches += 1
        for plan in plans:
            self._group_rows[plan.group] += len(plan.offsets) - 1
        counts = np.bincount(routing.expert_ids.cpu().numpy().ravel(), minlength=len(self._expert_pairs))
        self._expert_pairs += counts
        return int(counts.max())

    def statistics(self) -> DispatchStatistics:
        """See `DispatchStatistics`."""
        pairs = tuple((self._expert_pairs + self._lanes.expert_pairs).tolist())
        rows = tuple((self._lanes.group_rows + self._group_rows).tolist())
        return DispatchStatistics(self._dispatches, self._over_lanes, rows, pairs, self._waiting_s)


class _Answers:
    """One future for the answers of all groups."""

    def __init__(self, count: int) -> None:
        self.all: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.partials: list[Tensor | None] = [None] * count
        self._missing = count

    def put(self, index: int, outcome: Tensor | BaseException) -> None:
        """What came from one of them."""
        if self.all.done():
            return
        if isinstance(outcome, BaseException):
            self.all.set_exception(outcome)
            return
        self.partials[index] = outcome
        self._missing -= 1
        if not self._missing:
            self.all.set_result(None)  # wakes whoever waits, who combines


async def _send_all(
    groups: Sequence[SendingBackend], layer: int, hidden: Tensor, plans: Sequence[GroupPlan], deadline: float
) -> list[Tensor]:
    """As `gather_or_cancel` of their `run`, without tasks."""
    answers = _Answers(len(plans))
    sent: list[Sent] = []
    try:
        for index, plan in enumerate(plans):
            done = partial(answers.put, index)
            sent.append(groups[plan.group].send(layer, plan.take(hidden), deadline, done))
        if sent:
            await answers.all
    except BaseException:
        tasks = [task for each in sent if (task := each.cancel()) is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return cast(list[Tensor], answers.partials)


class BoundDispatch:
    """A dispatcher with a deadline: what `Decoder.forward` calls once per MoE layer.

    Attributes:
        largest_expert_tokens: of the most loaded expert in any layer so far.
        waited_s: for the groups, in all layers so far.
    """

    def __init__(self, dispatcher: Dispatcher, deadline: float, lanes: bool) -> None:
        self._dispatcher = dispatcher
        self._deadline = deadline
        self._lanes = lanes
        self.largest_expert_tokens = 0
        self.waited_s = 0.0

    async def __call__(self, layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        """See `Dispatcher.run`."""
        done = await self._dispatcher.run_counted(layer, hidden, routing, self._deadline, self._lanes)
        self.largest_expert_tokens = max(self.largest_expert_tokens, done.largest_expert_tokens)
        self.waited_s += done.waited_s
        return done.output
