"""Group-limited routing, against the gates of transformers and against its own definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.routing.grouped import GroupLimitedTopK
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

EXPERTS, HIDDEN = 12, 7


def random_gate(seed: int, std: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A gate matrix, a correction bias and hidden states."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator)
    bias = std * torch.randn(EXPERTS, generator=generator)
    return weight, bias, torch.randn(40, HIDDEN, generator=generator)


def reference(kind: type[Any], weight: Tensor, hidden: Tensor, bias: Tensor | None, **config: Any) -> Tensor:
    """What transformers gives each expert, 0 where it was not chosen: `[tokens, experts]`."""
    fields = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "hidden_size": HIDDEN, "norm_topk_prob": False}
    router = kind(SimpleNamespace(**{**fields, **config}))
    router.weight.data.copy_(weight)
    if bias is not None:
        router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        _, weights, ids = router(hidden)
    return torch.zeros(len(hidden), EXPERTS).scatter_(1, ids, weights)


def spread(gate: GroupLimitedTopK, hidden: Tensor) -> Tensor:
    routing = gate(hidden)
    assert routing.weights.dtype is torch.float32
    assert all(len(set(ids)) == gate.top_k for ids in routing.expert_ids.tolist())
    return torch.zeros(len(hidden), EXPERTS).scatter_(1, routing.expert_ids, routing.weights)


@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(1, 1, 5), (3, 2, 4), (4, 1, 3), (6, 5, 6)])
def test_softmax_scores_choose_as_deepseek_v2(groups: int, top_groups: int, top_k: int) -> None:
    for seed in range(10):
        weight, _, hidden = random_gate(seed)
        gate = GroupLimitedTopK(weight, top_k, "softmax", groups=groups, top_groups=top_groups, scaling=2.5)
        method = "greedy" if groups == 1 else "group_limited_greedy"
        expected = reference(
            DeepseekV2TopkRouter,
            weight,
            hidden,
            None,
            num_experts_per_tok=top_k,
            topk_method=method,
            n_group=groups,
            topk_group=top_groups,
            routed_scaling_factor=2.5,
        )
        torch.testing.assert_close(spread(gate, hidden), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(1, 1, 5), (3, 2, 4), (4, 1, 3), (6, 5, 6)])
def test_sigmoid_scores_with_a_bias_choose_as_deepseek_v3(
    groups: int, top_groups: int, top_k: int, renormalize: bool
) -> None:
    for seed in range(10):
        weight, bias, hidden = random_gate(seed)
        gate = GroupLimitedTopK(weight, top_k, "sigmoid", bias, groups, top_groups, renormalize, 1.7)
        expected = reference(
            DeepseekV3TopkRouter,
            weight,
            hidden,
            bias,
            num_experts_per_tok=top_k,
            topk_method="noaux_tc",
            n_group=groups,
            topk_group=top_groups,
            norm_topk_prob=renormalize,
            routed_scaling_factor=1.7,
        )
        torch.testing.assert_close(spread(gate, hidden), expected, atol=1e-6, rtol=1e-5)


@given(
    seed=st.integers(0, 2**16), groups=st.sampled_from([1, 2, 3, 4, 6, 12]), data=st.data(), biased=st.booleans()
)
def test_experts_lie_in_the_best_groups_and_are_the_best_there(
    seed: int, groups: int, data: st.DataObject, biased: bool
) -> None:
    size = EXPERTS // groups
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    weight, bias, hidden = random_gate(seed)
    gate = GroupLimitedTopK(weight, top_k, "sigmoid", bias if biased else None, groups, top_groups)
    scores = torch.sigmoid(hidden @ weight.T)
    preferences = scores + bias if biased else scores
    for row, ids in enumerate(gate(hidden).expert_ids.tolist()):
        counted = min(2, size) if biased else 1
        worth = [
            sum(sorted(group, reverse=True)[:counted]) for group in preferences[row].view(groups, size).tolist()
        ]
        open_groups = sorted(range(groups), key=lambda g: -worth[g])[:top_groups]
        candidates = [e for e in range(EXPERTS) if e // size in open_groups]
        best = sorted(candidates, key=lambda e: -float(preferences[row, e]))[:top_k]
        assert set(ids) == set(best)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    weight, _, hidden = random_gate(0)
    bias = torch.zeros(EXPERTS)
    bias[3] = 5.0
    routing = GroupLimitedTopK(weight, 2, "sigmoid", bias)(hidden)
    scores = torch.sigmoid(hidden @ weight.T)
    assert (routing.expert_ids == 3).any(-1).all()
    torch.testing.assert_close(routing.weights, scores.gather(1, routing.expert_ids))


def test_scores_are_computed_in_float32() -> None:
    """In bfloat16 the two experts would tie."""
    gate = GroupLimitedTopK(torch.tensor([[1.0], [1.001]]), 1, "sigmoid")
    assert gate(torch.ones(1, 1, dtype=torch.bfloat16)).expert_ids.tolist() == [[1]]
    assert gate.num_experts == 2


def test_no_tokens_give_no_routing() -> None:
    weight, bias, _ = random_gate(0)
    routing = GroupLimitedTopK(weight, 3, "sigmoid", bias, 3, 2)(torch.empty(0, HIDDEN))
    assert routing.expert_ids.shape == routing.weights.shape == (0, 3)
