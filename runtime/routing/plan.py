"""The dispatch plan: a token goes once to each group that holds any of its experts, and one row comes back.

Pure functions on arrays. With top-k routing over G groups a token makes min(k, G) rows instead of k (DeepEP's
per-rank mode): for top-8 over 2 groups that is 4x less traffic in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError
from .strategies import Routing

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class Placement:
    """Which group holds which experts; the same for every layer.

    Args:
        groups: global expert ids of each group. Every expert is in exactly one group; its place in the tuple is
            its local id there.

    Raises:
        ConfigurationError: an expert is missing, or in two groups.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self.groups = tuple(tuple(group) for group in groups)
        held = sorted(expert for group in self.groups for expert in group)
        if held != list(range(len(held))) or not all(self.groups):
            raise ConfigurationError(f"placement must hold every expert in exactly one group, is {self.groups}")
        self.num_experts = len(held)
        self.group_of = np.empty(self.num_experts, np.int16)  # 16 bits: numpy sorts these by radix
        self.local_of = np.empty(self.num_experts, np.int32)
        for index, group in enumerate(self.groups):
            self.group_of[list(group)] = index
            self.local_of[list(group)] = np.arange(len(group))


def contiguous_placement(num_experts: int, num_groups: int) -> Placement:
    """Experts in order, spread as evenly as they go.

    Raises:
        ConfigurationError: fewer experts than groups.
    """
    if not 1 <= num_groups <= num_experts:
        raise ConfigurationError(f"{num_experts} experts cannot be split into {num_groups} groups", "groups")
    return Placement([part.tolist() for part in np.array_split(np.arange(num_experts), num_groups)])


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The piece of a layer's work that one group gets.

    Attributes:
        hidden: `[rows, hidden]`, each token once.
        offsets: `[rows + 1]`; row r goes to the experts `experts[offsets[r]:offsets[r + 1]]`.
        experts: `[pairs]` local expert ids.
        weights: `[pairs]` gate weights.
    """

    hidden: Tensor
    offsets: Int32
    experts: Int32
    weights: Float32


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group's share of the routing; `rows` are the tokens' indices (None: all of them)."""

    group: int
    rows: Tensor | None
    offsets: Int32
    experts: Int32
    weights: Float32

    def take(self, hidden: Tensor) -> ExpertRows:
        """The rows to be sent; a view when the group gets every token."""
        rows = hidden if self.rows is None else hidden.index_select(0, self.rows.to(hidden.device))
        return ExpertRows(rows, self.offsets, self.experts, self.weights)


def plan_dispatch(routing: Routing, placement: Placement) -> list[GroupPlan]:
    """Cut a routing into one plan per group that any token goes to."""
    # numpy: at decode sizes its calls cost a third of torch's.
    expert_ids = routing.expert_ids.cpu().numpy()
    weights = routing.weights.cpu().numpy().ravel()
    tokens, top_k = expert_ids.shape
    expert_ids = expert_ids.ravel()
    if len(placement.groups) == 1 and tokens:
        offsets = np.arange(0, tokens * top_k + 1, top_k, dtype=np.int32)
        return [GroupPlan(0, None, offsets, placement.local_of[expert_ids], weights)]
    group_ids = placement.group_of[expert_ids]
    order = group_ids.argsort(kind="stable")  # pairs by group, and within a group by token
    pair_tokens = order // top_k
    local_ids, weights = placement.local_of[expert_ids[order]], weights[order]
    plans = []
    start = 0
    for group, count in enumerate(np.bincount(group_ids, minlength=len(placement.groups)).tolist()):
        if not count:
            continue
        pairs = slice(start, start + count)
        start += count
        rows, offsets = _runs(pair_tokens[pairs])
        index = None if len(rows) == tokens else torch.from_numpy(rows)
        plans.append(GroupPlan(group, index, offsets, local_ids[pairs], weights[pairs]))
    return plans


def _runs(values: NDArray[np.intp]) -> tuple[NDArray[np.intp], Int32]:
    """The distinct values of an ascending array, and where each begins, with the array's length at the end."""
    changes = np.empty(len(values) + 1, np.bool_)
    changes[0] = changes[-1] = True
    np.not_equal(values[1:], values[:-1], out=changes[1:-1])
    offsets = changes.nonzero()[0].astype(np.int32)
    return values[offsets[:-1]], offsets


def combine(plans: Sequence[GroupPlan], partials: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Add the groups' partial sums `[rows, hidden]` (float32) up to `[tokens, hidden]` float32.

    Groups are added in their order, whichever answered first, so that the sum is the same every time. The first
    group's partial sum may be used up for it.
    """
    if plans and plans[0].rows is None:
        total = partials[0].to(hidden.device)
        rest = list(zip(plans, partials, strict=True))[1:]
    else:
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        rest = list(zip(plans, partials, strict=True))
    for plan, partial in rest:
        partial = partial.to(hidden.device)
        if plan.rows is None:
            total.add_(partial)
        else:
            total.index_add_(0, plan.rows.to(hidden.device), partial)
    return total
