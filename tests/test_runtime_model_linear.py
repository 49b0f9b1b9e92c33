"""Matrix products with fixed weights: the same numbers in every layout."""

from __future__ import annotations

import pytest
import torch
from pimoe.runtime.model.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.randn(40)])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_products_are_those_of_the_plain_layout(dtype: torch.dtype, bias: torch.Tensor | None, rows: int) -> None:
    weight, hidden = torch.randn(40, 96).to(dtype), torch.randn(rows, 96).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    linear = Linear(weight, bias)
    expected = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(linear(hidden), expected, rtol=2e-2 if linear.is_packed else 0, atol=1e-2)
    assert linear(hidden).dtype is linear.dtype is dtype
    numbers = 40 * 96 + (0 if bias is None else 40)
    if linear.native is None:
        assert linear.nbytes == numbers * dtype.itemsize
    else:  # columns are made up to whole panels
        assert numbers * dtype.itemsize <= linear.nbytes <= 64 * 96 * dtype.itemsize + 64 * 4


def test_where_kernels_are_not_the_fastest_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hidden = torch.randn(40, 96), torch.randn(3, 96)
    monkeypatch.setattr("pimoe.runtime.native.kernels.are_fast", lambda: False)
    linear = Linear(weight)
    assert linear.native is None
    assert torch.equal(linear(hidden), torch.nn.functional.linear(hidden, weight))
    assert linear.nbytes == weight.nbytes


def test_without_the_operators_the_plain_layout_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pimoe.runtime.native.kernels.are_fast", lambda: False)
    monkeypatch.setattr("pimoe.runtime.model.linear._packs", lambda weight: False)
    linear = Linear(torch.randn(8, 8, dtype=torch.bfloat16))
    assert not linear.is_packed
    assert linear(torch.randn(2, 8, dtype=torch.bfloat16)).shape == (2, 8)
