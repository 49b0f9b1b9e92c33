"""Gated feed-forward networks of the trunk: dense layers, and the expert that every token passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import Linear
from .spec import Activation

ACTIVATION_FUNCTIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class GatedFeedForward:
    """`down(act(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202).

    Args:
        gate_up: `[2 * intermediate, hidden]`, gate above up, so that one product computes both.
        down: `[hidden, intermediate]`.
        activation: applied to the gate.
    """

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self._activation = ACTIVATION_FUNCTIONS[activation]

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[tokens, hidden]` -> `[tokens, hidden]`."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(self._activation(gate) * up)


class SharedExpert:
    """An expert that every token passes, weighted by a sigmoid of its own gate where it has one (Qwen2-MoE has).

    Args:
        network: the expert.
        gate: `[1, hidden]`, or None.
    """

    def __init__(self, network: GatedFeedForward, gate: Tensor | None = None) -> None:
        self.network = network
        self.gate = gate

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[tokens, hidden]` -> `[tokens, hidden]`."""
        if self.gate is None:
            return self.network(hidden)
        return torch.sigmoid(F.linear(hidden, self.gate)) * self.network(hidden)
