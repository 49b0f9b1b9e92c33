"""Attention with sinks: the kernel's way and the plain way against the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pimoe.runtime.model import sink_attention
from pimoe.runtime.model.sink_attention import attend_plainly, attend_with_sinks
from torch import Tensor

WAYS: dict[str, Callable[..., Tensor]] = {"kernel": attend_with_sinks, "plain": attend_plainly}


def definition(queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, seen: Tensor, scale: float) -> Tensor:
    """In float64: a further key per head, with the sink as its score and zeros as its value."""
    scores = (queries.double() @ keys.double().mT * scale).masked_fill(~seen, -torch.inf).exp()
    total = scores.sum(-1) + sinks.double().expand(scores.shape[:-1]).exp()
    return scores @ values.double() / total[..., None]


def tensors(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = (2, 3, queries, 16), (2, 3, keys, 16), (2, 3, keys, 16)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("sink", [-30.0, -1.0, 0.5, 4.0, 30.0])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_causal_attention(way: Callable[..., Tensor], sink: float, scale: float | None) -> None:
    sinks = torch.tensor([sink, sink + 1, sink - 1])[None, :, None]
    parts = tensors(9, 9)
    out = way(*parts, sinks, is_causal=True, scale=scale)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(out.double(), definition(*parts, sinks, seen, scale or 0.25), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", [(5, 11), (2, 1, 1, 11)])
def test_masked_attention(way: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[..., 0] = True
    mask = torch.zeros(shape).masked_fill_(~seen, -torch.inf)
    sinks = torch.randn(3, 1)
    parts = tensors(5, 11)
    out = way(*parts, sinks, mask)
    torch.testing.assert_close(out.double(), definition(*parts, sinks, seen, 0.25), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_agree_in_half_precision(dtype: torch.dtype) -> None:
    sinks, parts = torch.randn(2, 3, 4).to(dtype), tensors(4, 30, dtype)
    kernel, plain = attend_with_sinks(*parts, sinks), attend_plainly(*parts, sinks)
    assert kernel.dtype is plain.dtype is dtype
    torch.testing.assert_close(kernel, plain, atol=0.02, rtol=0.02)


def test_without_the_kernel_the_plain_way_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks, parts = torch.randn(3, 1), tensors(4, 6)
    monkeypatch.setattr(sink_attention, "_cpu_kernel", lambda: None)
    assert torch.equal(attend_with_sinks(*parts, sinks), attend_plainly(*parts, sinks))
