"""An expert group: some of a model's experts, for all its MoE layers, and the partial sums they give."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, InvalidTensorError
from ..model.checkpoint import Checkpoint
from ..model.spec import ExpertSpec
from ..native import kernels
from ..routing.plan import ExpertRows
from .lanes import lane_table
from .layers import LayerExperts
from .loading import load_layers
from .native import NativeExperts
from .options import DEFAULTS, ExpertOptions


class GroupStatistics(NamedTuple):
    """Since start: batches, rows and (row, expert) pairs computed, seconds of computing."""

    batches: int
    rows: int
    pairs: int
    busy_s: float


class ExpertGroup:
    """Holds experts and computes. Knows nothing of links or routers; not thread-safe.

    Args:
        experts: global ids; an expert's place is its local id.
        layers: MoE layer index -> that layer's experts, in the order of `experts`.

    Attributes:
        lanes: what lanes compute from, beside `forward`; None where there can be none.
    """

    def __init__(self, experts: Sequence[int], layers: Mapping[int, LayerExperts], hidden_size: int) -> None:
        self.experts = tuple(experts)
        self.layers = dict(layers)
        self.hidden_size = hidden_size
        self.lanes = lane_table(self.layers)
        self._batches = self._rows = self._pairs = 0
        self._busy_s = 0.0

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: ExpertSpec,
        experts: Sequence[int],
        dtype: torch.dtype,
        device: str = "cpu",
        options: ExpertOptions = DEFAULTS,
    ) -> ExpertGroup:
        """Read just these experts' tensors from the checkpoint and find the fastest kernel for them.

        Args:
            options: how to compute them.

        Raises:
            CheckpointError: a tensor is missing or has the wrong shape.
            ConfigurationError: options that these experts cannot have.
        """
        if unknown := [expert for expert in experts if not 0 <= expert < spec.num_experts]:
            raise CheckpointError(f"experts {unknown} are not in the model, which has {spec.num_experts}")
        layers = load_layers(checkpoint, spec, experts, dtype, device, options)
        return cls(experts, layers, spec.hidden_size)

    def use_threads(self, count: int) -> None:
        """How many threads compute a batch from now on; called on the thread that computes, since OpenMP's count
        is each thread's own."""
        torch.set_num_threads(count)
        kernels.use_threads(count)
        if self.lanes is not None:
            self.lanes.use_threads(count)

    @property
    def kernels(self) -> str:
        """What computes: the native kernels by name, or torch."""
        native = all(isinstance(held, NativeExperts) for held in self.layers.values())
        return kernels.description() if native else "torch"

    @property
    def weights_bytes(self) -> int:
        """Bytes of expert weights held."""
        return sum(layer.weights_bytes for layer in self.layers.values())

    def statistics(self) -> GroupStatistics:
        """See `GroupStatistics`."""
        batches, rows, pairs, busy_s = (0, 0, 0, 0.0) if self.lanes is None else self.lanes.counted()
        return GroupStatistics(
            self._batches + batches, self._rows + rows, self._pairs + pairs, self._busy_s + busy_s
        )

    def forward(self, layer: int, rows: ExpertRows) -> Tensor:
        """The rows' weighted sums over this group's experts: `[rows, hidden]` float32.

        Raises:
            InvalidTensorError: no such layer, or rows that do not fit this group.
        """
        started = time.monotonic()
        experts = self.layers.get(layer)
        if experts is None:
            raise InvalidTensorError(f"layer {layer} has no experts; these have: {sorted(self.layers)}")
        _check_rows(rows, self.hidden_size, len(self.experts))
        with torch.inference_mode():
            partial = experts.partial_sums(rows)
        if partial is None:
            raise _misfit(rows, self.hidden_size, len(self.experts))
        self._batches += 1
        self._rows += rows.hidden.shape[0]
        self._pairs += len(rows.experts)
        self._busy_s += time.monotonic() - started
        return partial


def _check_rows(rows: ExpertRows, hidden_size: int, num_experts: int) -> None:
    hidden, offsets, experts, weights = rows.hidden, rows.offsets, rows.experts, rows.weights
    fits = (
        hidden.dim() == 2
        and hidden.shape[1] == hidden_size
        and offsets.dtype == experts.dtype == np.int32
        and weights.dtype == np.float32
        and offsets.shape == (hidden.shape[0] + 1,)
        and experts.ndim == 1
        and experts.shape == weights.shape == (offsets[-1],)
        and experts.size > 0
    )
    if not fits:
        raise _misfit(rows, hidden_size, num_experts)


def _misfit(rows: ExpertRows, hidden_size: int, num_experts: int) -> InvalidTensorError:
    return InvalidTensorError(
        f"rows {tuple(rows.hidden.shape)} with pairs of shape {rows.experts.shape} do not fit a group of "
        f"{num_experts} experts of hidden size {hidden_size}"
    )
