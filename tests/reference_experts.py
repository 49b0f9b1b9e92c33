"""The plainest possible expert dispatch: every expert's weights in this process, one token at a time by expert."""

from __future__ import annotations

import torch
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.feed_forward import ACTIVATION_FUNCTIONS
from pimoe.runtime.model.spec import ExpertSpec
from pimoe.runtime.routing.strategies import Routing
from torch import Tensor
from torch.nn.functional import linear


class ReferenceExperts:
    """An `ExpertDispatch` that computes here. `calls` records (layer, tokens) of every dispatch."""

    def __init__(self, checkpoint: Checkpoint, spec: ExpertSpec, dtype: torch.dtype = torch.float32) -> None:
        self.weights = {
            (layer, expert): tuple(checkpoint.read(name, dtype) for name in spec.tensor_names(layer, expert))
            for layer in spec.moe_layers
            for expert in range(spec.num_experts)
        }
        self.activation = ACTIVATION_FUNCTIONS[spec.activation]
        self.calls: list[tuple[int, int]] = []

    async def __call__(self, layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        self.calls.append((layer, hidden.shape[0]))
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in set(routing.expert_ids.flatten().tolist()):
            gate, up, down = self.weights[layer, expert]
            rows, column = torch.where(routing.expert_ids == expert)
            tokens = hidden[rows]
            result = linear(self.activation(linear(tokens, gate)) * linear(tokens, up), down)
            out.index_add_(0, rows, result.float() * routing.weights[rows, column, None])
        return out
