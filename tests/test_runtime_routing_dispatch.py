"""The dispatcher: all groups at once, answers in any order, one failure for all, and what it counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
import torch
from pimoe.runtime.errors import DeadlineExceededError, UnavailableError
from pimoe.runtime.routing.dispatch import Dispatcher
from pimoe.runtime.routing.plan import ExpertRows, Placement, contiguous_placement
from pimoe.runtime.routing.strategies import Routing
from torch import Tensor
from waiting import eventually

HIDDEN = torch.arange(12.0).reshape(4, 3)
# Token 2 goes to experts 0 and 1 only, the others to 2 or 3 as well.
ROUTING = Routing(torch.tensor([[0, 2], [3, 1], [0, 1], [2, 3]]), torch.full((4, 2), 0.5))


class ScriptedGroup:
    """Expert e multiplies by e + 1. Runs `before` first; knows what it was asked and whether it was cancelled."""

    def __init__(self, experts: Sequence[int], before: Callable[[], object] | None = None) -> None:
        self.experts = experts
        self.before = before
        self.asked: list[tuple[int, ExpertRows, float]] = []
        self.cancelled = self.ended = False

    @property
    def computed_s(self) -> float | None:
        return None

    @property
    def replicas(self) -> int:
        return 1

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        self.asked.append((layer, rows, deadline))
        try:
            if self.before is not None:
                waiting = self.before()
                if waiting is not None:
                    await waiting  # type: ignore[misc]
        except asyncio.CancelledError:
            self.cancelled = True
            await asyncio.sleep(0)  # cleaning up may take a turn of the loop
            raise
        finally:
            self.ended = True
        out = torch.zeros(rows.hidden.shape)
        for row in range(len(out)):
            for pair in range(rows.offsets[row], rows.offsets[row + 1]):
                factor = self.experts[rows.experts[pair]] + 1
                out[row] += float(rows.weights[pair]) * factor * rows.hidden[row]
        return out


def expected() -> Tensor:
    return HIDDEN * (0.5 * (ROUTING.expert_ids + 1).sum(dim=1, keepdim=True))


def fail(error: Exception) -> Callable[[], None]:
    def before() -> None:
        raise error

    return before


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[2], [1, 3], [0]]])
async def test_groups_together_give_the_whole_sum(groups: list[list[int]]) -> None:
    backends = [ScriptedGroup(group) for group in groups]
    dispatcher = Dispatcher(Placement(groups), backends)
    output = await dispatcher.run(7, HIDDEN, ROUTING, deadline=123.5)
    assert torch.equal(output, expected())
    assert {(layer, deadline) for b in backends for layer, _, deadline in b.asked} == {(7, 123.5)}


async def test_bound_to_a_deadline_it_is_a_decoders_expert_dispatch() -> None:
    group = ScriptedGroup(range(4))
    bound = Dispatcher(contiguous_placement(4, 1), [group]).until(99.0)
    assert torch.equal(await bound(2, HIDDEN, ROUTING), expected())
    assert [(layer, deadline) for layer, _, deadline in group.asked] == [(2, 99.0)]


async def test_all_groups_are_asked_before_any_answers() -> None:
    everyone = asyncio.Barrier(4)
    backends = [ScriptedGroup([e], everyone.wait) for e in range(4)]
    output = await Dispatcher(contiguous_placement(4, 4), backends).run(0, HIDDEN, ROUTING, 1e9)
    assert torch.equal(output, expected())


async def test_who_answers_first_changes_no_bit() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3) * 1e6
    weights = torch.rand(4, 3)
    routing = Routing(torch.tensor([[0, 1, 2]] * 4), weights)
    outputs = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        gates = [asyncio.Event() for _ in range(3)]
        backends = [ScriptedGroup([e], gate.wait) for e, gate in enumerate(gates)]
        running = asyncio.ensure_future(
            Dispatcher(contiguous_placement(3, 3), backends).run(0, hidden, routing, 1e9)
        )
        for group in order:
            gates[group].set()
            await eventually(lambda asked=backends[group]: asked.ended)
        outputs.append(await running)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("error", [UnavailableError("group-1: no live replica"), ValueError("a bug")])
async def test_one_groups_error_surfaces_as_it_is_and_ends_the_others(error: Exception) -> None:
    waiting = ScriptedGroup([0, 1], asyncio.Event().wait)
    failing = ScriptedGroup([2, 3], fail(error))
    with pytest.raises(type(error)) as caught:
        await Dispatcher(contiguous_placement(4, 2), [waiting, failing]).run(0, HIDDEN, ROUTING, 1e9)
    assert caught.value is error
    assert waiting.cancelled
    assert waiting.ended, "the other group's work must have ended, not only been told to"


async def test_an_only_groups_error_surfaces() -> None:
    group = ScriptedGroup(range(4), fail(DeadlineExceededError("too late")))
    with pytest.raises(DeadlineExceededError, match="too late"):
        await Dispatcher(contiguous_placement(4, 1), [group]).run(0, HIDDEN, ROUTING, 1e9)


@pytest.mark.parametrize("groups", [1, 2])
async def test_a_leaving_caller_cancels_every_group(groups: int) -> None:
    placement = contiguous_placement(4, groups)
    backends = [ScriptedGroup(experts, asyncio.Event().wait) for experts in placement.groups]
    running = asyncio.ensure_future(Dispatcher(placement, backends).run(0, HIDDEN, ROUTING, 1e9))
    await eventually(lambda: all(backend.asked for backend in backends))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert all(backend.cancelled and backend.ended for backend in backends)


async def test_no_tokens_ask_nobody() -> None:
    backends = [ScriptedGroup([0, 1]), ScriptedGroup([2, 3])]
    routing = Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    output = await Dispatcher(contiguous_placement(4, 2), backends).run(0, torch.empty(0, 3), routing, 1e9)
    assert output.shape == (0, 3)
    assert not any(backend.asked for backend in backends)


async def test_a_group_without_tokens_is_not_asked() -> None:
    backends = [ScriptedGroup([0, 1]), ScriptedGroup([2, 3])]
    routing = Routing(torch.tensor([[1, 0]]), torch.ones(1, 2))
    await Dispatcher(contiguous_placement(4, 2), backends).run(0, HIDDEN[:1], routing, 1e9)
    assert [len(backend.asked) for backend in backends] == [1, 0]


async def test_statistics_count_rows_by_group_and_pairs_by_expert() -> None:
    groups = [[3, 0], [2, 1]]
    dispatcher = Dispatcher(Placement(groups), [ScriptedGroup(group) for group in groups])
    assert dispatcher.statistics() == (0, 0, (0, 0), (0, 0, 0, 0), 0.0)
    await dispatcher.run(0, HIDDEN, ROUTING, 1e9)
    await dispatcher.run(1, HIDDEN[:1], Routing(torch.tensor([[3, 0]]), torch.ones(1, 2)), 1e9)
    statistics = dispatcher.statistics()
    assert statistics.dispatches == 2
    assert statistics.group_rows == (5, 4)
    assert statistics.expert_pairs == (3, 2, 2, 3)
    assert statistics.waiting_s > 0
