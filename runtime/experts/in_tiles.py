"""Experts computed in tiles, so that each row's result is the same to the bit in any batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..model.tiles import TILE_ROWS, by_tiles
from ..routing.plan import Int32
from .layers import SortedExperts


class InTiles(SortedExperts):
    """Any kind of experts, given `TILE_ROWS` rows of one expert in each call.

    Args:
        experts: compute each row on its own.
    """

    def __init__(self, experts: SortedExperts) -> None:
        num_experts = experts.num_experts
        super().__init__(num_experts)
        self.experts = experts
        # Bounds of a tile that is all of one expert: nothing before it, everything from it on.
        self._bounds = (np.arange(num_experts + 1)[None, :] > np.arange(num_experts)[:, None]).astype(np.int32)
        self._bounds *= TILE_ROWS

    @property
    def weights_bytes(self) -> int:
        """See `LayerExperts`."""
        return self.experts.weights_bytes

    @property
    def dtype(self) -> torch.dtype:
        """See `LayerExperts`."""
        return self.experts.dtype

    def forward(self, hidden: Tensor, bounds: Int32) -> Tensor:
        """See `layers`."""
        outputs = []
        for expert in np.flatnonzero(np.diff(bounds)).tolist():

            def compute(rows: Tensor, bounds_of: Int32 = self._bounds[expert]) -> Tensor:
                return self.experts.forward(rows, bounds_of)

            outputs.append(by_tiles(compute, hidden[bounds[expert] : bounds[expert + 1]]))
        return torch.cat(outputs)
