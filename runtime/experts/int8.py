"""Experts with int8 weights where there is no native kernel for them: half the memory, computed by torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..native.packing import quantize
from ..routing.plan import Int32
from .layers import SortedExperts, StackedExperts
from .tensors import ExpertTensors


class Int8Experts(SortedExperts):
    """Weights as int8 with a scale for each output; one expert's at a time is made whole, where it is used.

    Args:
        like: the same experts with whole weights, still empty: it says what happens between the two products.
    """

    def __init__(self, like: StackedExperts) -> None:
        super().__init__(like.num_experts)
        self._like = like
        device = like.down.device
        whole = like.gate_up, like.down
        self._weights = tuple(torch.empty(w.shape, dtype=torch.int8, device=device) for w in whole)
        self._scales = tuple(torch.empty(w.shape[:2], device=device) for w in whole)
        like.gate_up, like.down = (w.new_empty((1, *w.shape[1:])) for w in whole)

    def store(self, expert: int, tensors: ExpertTensors) -> None:
        """Takes over one expert's tensors."""
        for stored, scales, weight in zip(self._weights, self._scales, tensors[:2], strict=True):
            stored[expert], scales[expert] = quantize(weight)
        self._like.store_biases(expert, tensors)

    @property
    def weights_bytes(self) -> int:
        """See `LayerExperts`."""
        return sum(tensor.nbytes for tensor in (*self._weights, *self._scales, *(self._like.biases or ())))

    @property
    def dtype(self) -> torch.dtype:
        """See `SortedExperts`."""
        return self._like.dtype

    def forward(self, hidden: Tensor, bounds: Int32) -> Tensor:
        """See `SortedExperts`."""
        outputs = []
        for expert in np.flatnonzero(np.diff(bounds)).tolist():
            rows = hidden[bounds[expert] : bounds[expert + 1]]
            projected = self._product(0, expert, rows)
            outputs.append(self._product(1, expert, self._like.combine(projected)))
        return torch.cat(outputs)

    def _product(self, which: int, expert: int, rows: Tensor) -> Tensor:
        product = F.linear(rows, self._weights[which][expert].to(rows.dtype)) * self._scales[which][expert]
        biases = self._like.biases
        return (product if biases is None else product + biases[which][expert]).to(rows.dtype)
