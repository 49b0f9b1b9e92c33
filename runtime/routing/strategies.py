"""Routing strategies: which experts each token goes to, and with what weight.

A strategy is any callable `hidden [tokens, hidden] -> Routing`. It knows nothing of groups, replicas or
links: that is the dispatch plan's business. A new strategy is a new class in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..native import kernels
from ..native.trunk import PackedGate


@dataclass(frozen=True, slots=True)
class Routing:
    """Each token's choice of experts.

    Attributes:
        expert_ids: `[tokens, top_k]` int64, distinct within a row.
        weights: `[tokens, top_k]` float32, the factor of each expert's output in the token's sum.
    """

    expert_ids: Tensor
    weights: Tensor


class RoutingStrategy(Protocol):
    """Chooses experts for tokens."""

    @property
    def num_experts(self) -> int:
        """Expert ids are below this."""
        ...

    def __call__(self, hidden: Tensor) -> Routing:
        """`hidden [tokens, hidden]` in the model's dtype -> the tokens' routing."""
        ...


class TopKSoftmax:
    """Softmax over all experts in float32, then the `top_k` largest (Shazeer et al., arXiv 1701.06538; the gate
    of Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE).

    Args:
        weight: `[experts, hidden]` gate matrix in the model's dtype.
        top_k: experts per token.
        renormalize: divide each token's chosen weights by their sum.
        round_weights: round the weights to the model's dtype, as the reference implementations do.
    """

    def __init__(self, weight: Tensor, top_k: int, renormalize: bool, round_weights: bool = True) -> None:
        self.weight = weight
        self.top_k = top_k
        self.renormalize = renormalize
        self.round_weights = round_weights
        self._native: PackedGate | None = None
        if kernels.are_fast() and kernels.supports(weight.dtype, weight.device, weight.shape[1]):
            self._native = PackedGate(weight, top_k, renormalize, round_weights)

    @property
    def num_experts(self) -> int:
        """Rows of the gate matrix."""
        return self.weight.shape[0]

    @property
    def is_native(self) -> bool:
        """Whether native kernels compute it, each token on its own."""
        return self._native is not None

    def __call__(self, hidden: Tensor) -> Routing:
        """See `RoutingStrategy`."""
        if self._native is not None:
            return Routing(*self._native(hidden))
        logits = torch.nn.functional.linear(hidden, self.weight)
        weights, expert_ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.round_weights and self.weight.dtype is not torch.float32:
            weights = weights.to(self.weight.dtype).float()
        return Routing(expert_ids, weights)


class SoftmaxOfTopK:
    """The `top_k` largest logits, then a softmax over just those (the gate of gpt-oss).

    Args:
        weight: `[experts, hidden]` gate matrix in the model's dtype.
        bias: `[experts]`, added to the logits.
        top_k: experts per token.
    """

    def __init__(self, weight: Tensor, bias: Tensor, top_k: int) -> None:
        self.weight = weight
        self.bias = bias
        self.top_k = top_k

    @property
    def num_experts(self) -> int:
        """Rows of the gate matrix."""
        return self.weight.shape[0]

    def __call__(self, hidden: Tensor) -> Routing:
        """See `RoutingStrategy`."""
        logits, expert_ids = torch.nn.functional.linear(hidden, self.weight, self.bias).topk(self.top_k, dim=-1)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
        # The reference rounds them to the model's dtype.
        return Routing(expert_ids, weights.to(self.weight.dtype).float())
