"""Attention whose softmax has one more place per head where nothing is read, the sink (as gpt-oss has)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend_with_sinks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """As `scaled_dot_product_attention`, with a logit of its own for each head in the softmax's denominator.

    Args:
        queries: `[batch, heads, queries, dim]`; keys and values: `[batch, heads, keys, dim]`.
        sinks: the logits; broadcasts to `[batch, heads, queries]`.
        mask: additive; broadcasts to `[batch, heads, queries, keys]`, in two or four dimensions.
        is_causal: query i sees the keys up to i.
        scale: of the scores; None for `dim ** -0.5`.

    Returns:
        `[batch, heads, queries, dim]`.
    """
    kernel = _cpu_kernel() if queries.device.type == "cpu" else None
    if kernel is None:
        return attend_plainly(queries, keys, values, sinks, mask, is_causal, scale)
    out, log_sum = kernel(queries, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale)
    # The sink takes its share of the sum: exp(log_sum) / (exp(log_sum) + exp(sink)).
    share = torch.sigmoid(log_sum - sinks.float())
    attended: Tensor = out * share.unsqueeze(-1).to(out.dtype)
    return attended


def attend_plainly(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`attend_with_sinks` from public operators alone, holding all scores in float32 at once: for devices whose
    kernels do not give away the sum of their softmax."""
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    scores = (queries @ keys.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    places = sinks.float().expand(scores.shape[:-1]).unsqueeze(-1)
    weights = torch.cat((scores, places), -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values


def _cpu_kernel() -> Any:
    """torch's own kernel below `scaled_dot_product_attention`, the only one that returns the log of the softmax's
    sum; it is not in the public interface."""
    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
