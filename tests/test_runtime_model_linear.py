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
    assert linear.nbytes == (40 * 96 + (0 if bias is None else 40)) * dtype.itemsize


def test_without_the_operators_the_plain_layout_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pimoe.runtime.model.linear._packs", lambda weight: False)
    linear = Linear(torch.randn(8, 8, dtype=torch.bfloat16))
    assert not linear.is_packed
    assert linear(torch.randn(2, 8, dtype=torch.bfloat16)).shape == (2, 8)
