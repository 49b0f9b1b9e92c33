"""The plainest possible expert dispatch: every expert's weights in this process, one token at a time by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.feed_forward import ACTIVATION_FUNCTIONS
from pimoe.runtime.model.spec import ExpertSpec
from pimoe.runtime.routing.strategies import Routing
from torch import Tensor
from torch.nn.functional import linear

Expert = Callable[[Tensor], Tensor]


class ReferenceExperts:
    """An `ExpertDispatch` that computes here. `calls` records (layer, tokens) of every dispatch."""

    def __init__(self, checkpoint: Checkpoint, spec: ExpertSpec, dtype: torch.dtype = torch.float32) -> None:
        read = _gated if spec.stacked is None else _stacked
        self.experts = {
            (layer, expert): read(checkpoint, spec, layer, expert, dtype)
            for layer in spec.moe_layers
            for expert in range(spec.num_experts)
        }
        self.calls: list[tuple[int, int]] = []

    async def __call__(self, layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        self.calls.append((layer, hidden.shape[0]))
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in set(routing.expert_ids.flatten().tolist()):
            rows, column = torch.where(routing.expert_ids == expert)
            result = self.experts[layer, expert](hidden[rows])
            out.index_add_(0, rows, result.float() * routing.weights[rows, column, None])
        return out


def _gated(checkpoint: Checkpoint, spec: ExpertSpec, layer: int, expert: int, dtype: torch.dtype) -> Expert:
    gate, up, down = (checkpoint.read(name, dtype) for name in spec.tensor_names(layer, expert))
    activation = ACTIVATION_FUNCTIONS[spec.activation]
    return lambda tokens: linear(activation(linear(tokens, gate)) * linear(tokens, up), down)


def _stacked(checkpoint: Checkpoint, spec: ExpertSpec, layer: int, expert: int, dtype: torch.dtype) -> Expert:
    """As gpt-oss stores and computes it."""
    stacked = spec.stacked
    assert stacked is not None
    gate_up, gate_up_bias, down, down_bias = (
        checkpoint.read(name, dtype)[expert] for name in stacked.names(layer)
    )

    def compute(tokens: Tensor) -> Tensor:
        projected = tokens @ gate_up + gate_up_bias
        gate = projected[:, ::2].clamp(max=stacked.limit)
        up = projected[:, 1::2].clamp(min=-stacked.limit, max=stacked.limit)
        return ((up + 1) * gate * torch.sigmoid(stacked.alpha * gate)) @ down + down_bias

    return compute
