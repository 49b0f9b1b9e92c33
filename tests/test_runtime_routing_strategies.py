"""The gates: softmax in float32, before or after the k best are chosen, renormalised and rounded as asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.routing.strategies import SoftmaxOfTopK, TopKSoftmax


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 9),
    num_experts=st.integers(1, 12),
    data=st.data(),
    renormalize=st.booleans(),
    width=st.sampled_from([5, 6]),  # native kernels take even ones
)
def test_each_token_gets_its_k_most_probable_experts(
    seed: int, tokens: int, num_experts: int, data: st.DataObject, renormalize: bool, width: int
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_experts, width, generator=generator)
    hidden = torch.randn(tokens, width, generator=generator)

    routing = TopKSoftmax(weight, top_k, renormalize)(hidden)

    assert routing.expert_ids.dtype is torch.int64
    assert routing.weights.dtype is torch.float32
    assert routing.expert_ids.shape == routing.weights.shape == (tokens, top_k)
    probabilities = torch.softmax((hidden.double() @ weight.double().T), dim=-1)
    for token in range(tokens):
        ids = routing.expert_ids[token]
        assert len(set(ids.tolist())) == top_k
        kept = probabilities[token, ids]
        left_out = probabilities[token].clone()
        left_out[ids] = 0
        assert kept.min() >= left_out.max() - 1e-6
        expected = kept / kept.sum() if renormalize else kept
        torch.testing.assert_close(routing.weights[token].double(), expected, atol=1e-5, rtol=1e-4)


def test_num_experts_is_the_gates_rows() -> None:
    assert TopKSoftmax(torch.zeros(7, 3), 2, True).num_experts == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_models_dtype_where_the_reference_does_so(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(6, 8).to(dtype), torch.randn(20, 8).to(dtype)
    rounded = TopKSoftmax(weight, 3, True)(hidden)
    exact = TopKSoftmax(weight, 3, True, round_weights=False)(hidden)
    assert torch.equal(rounded.weights, exact.weights.to(dtype).float())
    assert not torch.equal(rounded.weights, exact.weights)
    assert torch.equal(rounded.expert_ids, exact.expert_ids)


def test_softmax_is_computed_in_float32() -> None:
    """In bfloat16 the two experts would tie."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    hidden = torch.tensor([[4.0, 4.03125]], dtype=torch.bfloat16)
    routing = TopKSoftmax(weight, 2, False, round_weights=False)(hidden)
    assert routing.expert_ids.tolist() == [[1, 0]]
    expected = torch.softmax(torch.tensor([4.03125, 4.0]), dim=-1)
    torch.testing.assert_close(routing.weights[0], expected, atol=1e-7, rtol=0)


def test_softmax_of_top_k_weighs_the_chosen_among_themselves() -> None:
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(6, 8), torch.randn(6), torch.randn(20, 8)
    gate = SoftmaxOfTopK(weight, bias, 3)
    routing = gate(hidden)
    logits = hidden.double() @ weight.double().T + bias
    best, ids = logits.topk(3, dim=-1)
    assert gate.num_experts == 6
    assert torch.equal(routing.expert_ids, ids)
    assert routing.weights.dtype is torch.float32
    torch.testing.assert_close(routing.weights.double(), best.softmax(-1), atol=1e-6, rtol=1e-5)


def test_softmax_of_top_k_rounds_its_weights_to_the_models_dtype() -> None:
    torch.manual_seed(0)
    gate = SoftmaxOfTopK(torch.randn(6, 8).bfloat16(), torch.randn(6).bfloat16(), 3)
    weights = gate(torch.randn(20, 8).bfloat16()).weights
    assert torch.equal(weights, weights.bfloat16().float())
