"""Expert classes for tests of custom experts; a checkpoint names them by import path."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaleExpert(nn.Module):
    """`x * scale + shift`, with an integer buffer that must keep its dtype."""

    counts: Tensor

    def __init__(self, hidden_size: int, shift: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.shift = shift
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[tokens, hidden]` -> the same."""
        return hidden * self.scale + self.shift


class NotAModule:
    """Importable, and no expert."""


class Outer:
    """Holds a nested expert class."""

    class Inner(ScaleExpert):
        """Reached by "custom_experts:Outer.Inner"."""
