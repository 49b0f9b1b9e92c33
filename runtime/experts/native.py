"""Gated experts computed by the native kernels: one call for a layer's whole dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.expert_spec import ExpertSpec
from ..native import kernels
from ..routing.plan import ExpertRows
from .tensors import ExpertTensors


def has_native(spec: ExpertSpec, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether there is a kernel for these experts there."""
    known = spec.custom_class is None and _activation(spec) in kernels.ACTIVATIONS
    return known and kernels.supports(dtype, device, spec.hidden_size)


def _activation(spec: ExpertSpec) -> str:
    return spec.activation if spec.stacked is None else "clamped_swiglu"


class NativeExperts:
    """See the module. A row's result has the same bits whatever else is in the dispatch.

    Args:
        num_experts: how many these are.
        spec: of all experts of the model; `has_native` of it holds.
        dtype: of rows.
        int8: whether weights are rounded to int8, with a scale for each output.

    Attributes:
        packed: what computes.
    """

    def __init__(self, num_experts: int, spec: ExpertSpec, dtype: torch.dtype, int8: bool) -> None:
        kind = kernels.kind_of(dtype, int8)
        assert kind is not None
        clamp = (1.0, 0.0) if spec.stacked is None else (spec.stacked.alpha, spec.stacked.limit)
        self._dtype = dtype
        self.packed = kernels.PackedExperts(
            num_experts,
            spec.hidden_size,
            spec.intermediate_size,
            kind,
            _activation(spec),
            clamp,
            has_bias=spec.stacked is not None,
        )

    def store(self, expert: int, tensors: ExpertTensors) -> None:
        """Takes over one expert's tensors."""
        self.packed.store(expert, tensors.gate_up, tensors.down, tensors.biases)

    @property
    def weights_bytes(self) -> int:
        """See `LayerExperts`."""
        return self.packed.nbytes

    def partial_sums(self, rows: ExpertRows) -> Tensor | None:
        """See `LayerExperts`."""
        return self.packed(rows.hidden.to(self._dtype), rows.offsets, rows.experts, rows.weights)
