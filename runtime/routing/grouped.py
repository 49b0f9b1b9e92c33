"""Group-limited routing: a token's experts lie in a few groups of experts (DeepSeek-V2, arXiv 2405.04434;
DeepSeek-V3, arXiv 2412.19437).

These groups are the gate's own: which expert group's process holds an expert is another matter.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .strategies import Routing

Scores = Literal["softmax", "sigmoid"]


class GroupLimitedTopK:
    """Scores in float32; the best groups; the `top_k` best experts in those; their scores times `scaling`.

    Args:
        weight: `[experts, hidden]` float32 gate matrix.
        top_k: experts per token.
        scores: of all experts, or of each by itself.
        correction_bias: `[experts]` float32, added for choosing but not for weighing (arXiv 2408.15664). With it a
            group counts as much as its two best experts together, without it as its best one.
        groups: of equal size, side by side; 1 does not limit.
        top_groups: groups per token.
        renormalize: divide each token's chosen scores by their sum.
        scaling: factor of all weights.
    """

    def __init__(
        self,
        weight: Tensor,
        top_k: int,
        scores: Scores,
        correction_bias: Tensor | None = None,
        groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = False,
        scaling: float = 1.0,
    ) -> None:
        self.weight = weight
        self.top_k = top_k
        self.scores = scores
        self.correction_bias = correction_bias
        self.groups, self.top_groups = groups, top_groups
        self.renormalize = renormalize
        self.scaling = scaling

    @property
    def num_experts(self) -> int:
        """Rows of the gate matrix."""
        return self.weight.shape[0]

    def __call__(self, hidden: Tensor) -> Routing:
        """See `RoutingStrategy`."""
        logits = torch.nn.functional.linear(hidden.float(), self.weight)
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        expert_ids = self._choose(scores)
        weights = scores.gather(1, expert_ids)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(expert_ids, weights * self.scaling)

    def _choose(self, scores: Tensor) -> Tensor:
        """`[tokens, experts]` -> `[tokens, top_k]` expert ids."""
        preferences = scores if self.correction_bias is None else scores + self.correction_bias
        if self.top_groups < self.groups:
            by_group = preferences.view(-1, self.groups, self.num_experts // self.groups)
            best = by_group.topk(self._counted(by_group.shape[2]), dim=-1).values.sum(-1)
            kept = best.topk(self.top_groups, dim=-1).indices
            closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            preferences = by_group.masked_fill(closed[..., None], -torch.inf).flatten(1)
        return preferences.topk(self.top_k, dim=-1).indices

    def _counted(self, group_size: int) -> int:
        """How many experts speak for their group."""
        return 1 if self.correction_bias is None else min(2, group_size)
