"""The dispatch plan: cut by group, compute, combine; the same as computing everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.errors import ConfigurationError
from pimoe.runtime.routing.plan import (
    ExpertRows,
    GroupPlan,
    Placement,
    combine,
    contiguous_placement,
    plan_dispatch,
)
from pimoe.runtime.routing.strategies import Routing
from torch import Tensor

HIDDEN = 5


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any number of experts in any groups, uneven and out of order."""
    experts = draw(st.permutations(range(draw(st.integers(1, 12)))))
    labels = draw(st.lists(st.integers(0, 4), min_size=len(experts), max_size=len(experts)))
    groups = [[e for e, label in zip(experts, labels, strict=True) if label == group] for group in range(5)]
    return Placement([group for group in groups if group])


@st.composite
def dispatches(draw: st.DrawFn) -> tuple[Placement, Routing]:
    """A placement, and a routing over its experts for up to 8 tokens."""
    placement = draw(placements())
    num_experts = placement.num_experts
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.integers(0, 8))
    ids = [draw(st.permutations(range(num_experts)))[:top_k] for _ in range(tokens)]
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return placement, Routing(torch.tensor(ids, dtype=torch.int64).reshape(tokens, top_k), weights)


def expert_matrices(num_experts: int) -> Tensor:
    return torch.randn(num_experts, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(num_experts))


def dense_reference(hidden: Tensor, routing: Routing, experts: Tensor) -> Tensor:
    """Every token through every expert, weighted; no plan."""
    factors = torch.zeros(len(hidden), len(experts)).scatter_(1, routing.expert_ids, routing.weights)
    return torch.einsum("te,td,edh->th", factors, hidden, experts)


def compute_group(rows: ExpertRows, held: Tensor) -> Tensor:
    """One group's partial sums, row by row."""
    partial = torch.zeros(rows.hidden.shape)
    for row in range(len(rows.hidden)):
        for pair in range(rows.offsets[row], rows.offsets[row + 1]):
            partial[row] += float(rows.weights[pair]) * (rows.hidden[row] @ held[rows.experts[pair]])
    return partial


def tokens_of(plan: GroupPlan, tokens: int) -> list[int]:
    return list(range(tokens)) if plan.rows is None else plan.rows.tolist()


@settings(max_examples=150, deadline=None)
@given(dispatches())
def test_plan_compute_and_combine_equal_the_dense_sum(dispatch: tuple[Placement, Routing]) -> None:
    placement, routing = dispatch
    experts = expert_matrices(placement.num_experts)
    hidden = torch.randn(len(routing.expert_ids), HIDDEN, generator=torch.Generator().manual_seed(1))

    plans = plan_dispatch(routing, placement)
    partials = [compute_group(plan.take(hidden), experts[list(placement.groups[plan.group])]) for plan in plans]
    output = combine(plans, partials, hidden)

    assert output.dtype is torch.float32
    torch.testing.assert_close(output, dense_reference(hidden, routing, experts), atol=1e-4, rtol=1e-4)


@settings(max_examples=150, deadline=None)
@given(dispatches())
def test_a_token_makes_one_row_in_each_group_of_its_experts_and_none_elsewhere(
    dispatch: tuple[Placement, Routing],
) -> None:
    placement, routing = dispatch
    tokens, top_k = routing.expert_ids.shape
    plans = plan_dispatch(routing, placement)

    assert [plan.group for plan in plans] == sorted({plan.group for plan in plans})
    for group, held in enumerate(placement.groups):
        wanted = [t for t in range(tokens) if set(routing.expert_ids[t].tolist()) & set(held)]
        planned = [tokens_of(plan, tokens) for plan in plans if plan.group == group]
        assert planned == ([wanted] if wanted else [])
    assert sum(len(plan.experts) for plan in plans) == tokens * top_k
    for plan in plans:
        assert (plan.rows is None) == (len(plan.offsets) - 1 == tokens)
        rows = tokens_of(plan, tokens)
        for row, token in enumerate(rows):
            pairs = slice(plan.offsets[row], plan.offsets[row + 1])
            held = [placement.groups[plan.group][local] for local in plan.experts[pairs]]
            chosen = routing.expert_ids[token].tolist()
            expected = [(e, float(routing.weights[token, chosen.index(e)])) for e in chosen if e in held]
            assert list(zip(held, plan.weights[pairs].tolist(), strict=True)) == expected


@settings(max_examples=50, deadline=None)
@given(dispatches())
def test_pieces_are_what_a_link_carries(dispatch: tuple[Placement, Routing]) -> None:
    placement, routing = dispatch
    for plan in plan_dispatch(routing, placement):
        assert plan.offsets.dtype == plan.experts.dtype == np.int32
        assert plan.weights.dtype == np.float32
        assert all(array.flags.c_contiguous for array in (plan.offsets, plan.experts, plan.weights))


def test_top_8_over_two_groups_sends_two_rows_instead_of_eight() -> None:
    """The arithmetic that the design counts on."""
    scores = torch.rand(50, 64, generator=torch.Generator().manual_seed(0))
    weights, ids = scores.topk(8)
    plans = plan_dispatch(Routing(ids, weights), contiguous_placement(64, 2))
    rows = sum(len(plan.offsets) - 1 for plan in plans)
    assert rows <= 100
    assert sum(len(plan.experts) for plan in plans) == 400


def test_one_group_gets_the_hidden_states_themselves() -> None:
    hidden = torch.randn(4, HIDDEN)
    routing = Routing(torch.tensor([[1, 0], [2, 1], [0, 2], [2, 0]]), torch.rand(4, 2))
    (plan,) = plan_dispatch(routing, Placement([[2, 0, 1]]))
    assert plan.take(hidden).hidden is hidden
    assert plan.offsets.tolist() == [0, 2, 4, 6, 8]
    assert plan.experts.tolist() == [2, 1, 0, 2, 1, 0, 0, 1]
    partial = torch.randn(4, HIDDEN)
    assert combine([plan], [partial], hidden) is partial


@pytest.mark.parametrize("groups", [1, 2])
def test_no_tokens_make_no_pieces(groups: int) -> None:
    routing = Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert plan_dispatch(routing, contiguous_placement(4, groups)) == []
    assert combine([], [], torch.empty(0, HIDDEN)).shape == (0, HIDDEN)


def test_groups_are_added_in_their_order() -> None:
    """Float32 sums depend on it: (1e8 + 1) - 1e8 is 0, and (1e8 - 1e8) + 1 is 1."""
    hidden = torch.zeros(2, 1)
    everyone = [
        GroupPlan(g, None, np.zeros(3, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)) for g in range(3)
    ]
    values = (1e8, 1.0, -1e8)
    assert combine(everyone, [torch.full((2, 1), v) for v in values], hidden).tolist() == [[0.0], [0.0]]
    one_row = torch.tensor([1])
    some = [GroupPlan(p.group, one_row, p.offsets[:2], p.experts, p.weights) for p in everyone]
    assert combine(some, [torch.full((1, 1), v) for v in values], hidden).tolist() == [[0.0], [0.0]]
    reordered = [torch.full((1, 1), v) for v in (1e8, -1e8, 1.0)]
    assert combine(some, reordered, hidden).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("groups", [[[0, 1], [1, 2]], [[0], [2]], [[0, 1], []], [[1, 2]], [[-1, 0]]])
def test_every_expert_must_be_in_exactly_one_group(groups: list[list[int]]) -> None:
    with pytest.raises(ConfigurationError, match="exactly one group"):
        Placement(groups)


def test_placement_knows_group_and_place_of_every_expert() -> None:
    placement = Placement([[3, 0], [1], [4, 2]])
    assert placement.num_experts == 5
    assert placement.group_of.tolist() == [0, 1, 2, 0, 2]
    assert placement.local_of.tolist() == [1, 0, 1, 0, 0]


@given(num_experts=st.integers(1, 40), data=st.data())
def test_contiguous_groups_are_even_and_in_order(num_experts: int, data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, num_experts))
    placement = contiguous_placement(num_experts, num_groups)
    sizes = [len(group) for group in placement.groups]
    assert len(sizes) == num_groups
    assert max(sizes) - min(sizes) <= 1
    assert [expert for group in placement.groups for expert in group] == list(range(num_experts))


@pytest.mark.parametrize("num_groups", [0, -1, 5])
def test_experts_cannot_be_cut_into_more_groups_than_there_are(num_groups: int) -> None:
    with pytest.raises(ConfigurationError, match="4 experts cannot be split"):
        contiguous_placement(4, num_groups)
