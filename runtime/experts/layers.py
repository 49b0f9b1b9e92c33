"""The experts of one layer that a group holds, computed by torch. A new kind of expert is a new class here.

`SortedExperts` take rows already sorted by expert: `hidden [pairs, hidden]` where local expert e has the rows
`bounds[e]:bounds[e + 1]`, and return `[pairs, hidden]`, unweighted. Others get a dispatch's rows as they come and
do all of it themselves (`native`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.feed_forward import ACTIVATION_FUNCTIONS
from ..model.spec import Activation
from ..routing.plan import ExpertRows, Int32
from .tensors import ExpertTensors

_CALIBRATION_PAIRS = (1, 8, 64, 512)
_NEVER = 2**62


class LayerExperts(Protocol):
    """Experts of one layer."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights held."""
        ...

    def partial_sums(self, rows: ExpertRows) -> Tensor | None:
        """The rows' weighted sums over these experts, `[rows, hidden]` float32; None where a pair names no expert
        of these."""
        ...


class SortedExperts(ABC):
    """Experts that compute rows sorted by expert.

    Args:
        num_experts: how many they are.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    @property
    @abstractmethod
    def weights_bytes(self) -> int:
        """See `LayerExperts`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of rows and results."""

    @abstractmethod
    def forward(self, hidden: Tensor, bounds: Int32) -> Tensor:
        """See the module."""

    def partial_sums(self, rows: ExpertRows) -> Tensor | None:
        """See `LayerExperts`."""
        if not _pairs_fit(rows, self.num_experts):
            return None
        order = np.argsort(rows.experts, kind="stable")
        tokens = np.repeat(np.arange(rows.hidden.shape[0]), rows.offsets[1:] - rows.offsets[:-1])[order]
        bounds = np.zeros(self.num_experts + 1, np.int32)
        np.cumsum(np.bincount(rows.experts, minlength=self.num_experts), out=bounds[1:])
        device = rows.hidden.device
        token_index = torch.from_numpy(tokens).to(device)
        outputs = self.forward(rows.hidden.to(self.dtype).index_select(0, token_index), bounds)
        weighted = outputs.float() * torch.from_numpy(rows.weights[order]).to(device)[:, None]
        partial = torch.zeros(rows.hidden.shape, dtype=torch.float32, device=device)
        if device.type == "cpu":
            return partial.index_add_(0, token_index, weighted)
        # On a GPU index_add_ adds in any order. This sorts first: what is sent again gives the same bits.
        return partial.index_put_((token_index,), weighted, accumulate=True)


def _pairs_fit(rows: ExpertRows, num_experts: int) -> bool:
    offsets, experts = rows.offsets, rows.experts
    in_order = offsets[0] == 0 and (offsets[1:] - offsets[:-1]).min() >= 0
    return bool(in_order and experts.min() >= 0 and experts.max() < num_experts)


class StackedExperts(SortedExperts):
    """Feed-forward experts of one shape, stacked: `down(combine(gate_up(x)))`; kinds differ in `_combine`.

    Args:
        gate_up: `[experts, 2 * intermediate, hidden]`, gate rows first.
        down: `[experts, hidden, intermediate]`.
        biases: `[experts, 2 * intermediate]` and `[experts, hidden]`, added to the two products; or None.

    Attributes:
        grouped_from_pairs: from so many rows on, grouped GEMM is used and not a loop.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, biases: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(down.shape[0])
        self.gate_up = gate_up
        self.down = down
        self.biases = biases
        # grouped_mm wants rows of whole 16 bytes, on the CPU too.
        self._can_group = all(weight.shape[2] * weight.itemsize % 16 == 0 for weight in (gate_up, down))
        # On a GPU one grouped kernel beats a launch per expert; only bfloat16 has such a kernel everywhere.
        grouped = self._can_group and gate_up.is_cuda and gate_up.dtype is torch.bfloat16
        self.grouped_from_pairs = 0 if grouped else _NEVER

    @abstractmethod
    def _combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """What goes into the second product; both `[rows, intermediate]`, and may be overwritten."""

    def combine(self, projected: Tensor) -> Tensor:
        """What goes into the second product: of `[rows, 2 * inner]`, which is overwritten, `[rows, inner]`."""
        return self._combine(*projected.chunk(2, dim=-1))

    def store(self, expert: int, tensors: ExpertTensors) -> None:
        """Takes over one expert's tensors."""
        self.gate_up[expert], self.down[expert] = tensors.gate_up, tensors.down
        self.store_biases(expert, tensors)

    def store_biases(self, expert: int, tensors: ExpertTensors) -> None:
        """Takes over one expert's biases, if it has any."""
        if self.biases is not None and tensors.biases is not None:
            self.biases[0][expert], self.biases[1][expert] = tensors.biases

    @property
    def weights_bytes(self) -> int:
        """See `LayerExperts`."""
        return sum(tensor.nbytes for tensor in (self.gate_up, self.down, *(self.biases or ())))

    @property
    def dtype(self) -> torch.dtype:
        """See `LayerExperts`."""
        return self.gate_up.dtype

    def forward(self, hidden: Tensor, bounds: Int32) -> Tensor:
        """See the module."""
        if hidden.shape[0] >= self.grouped_from_pairs:
            return self.forward_grouped(hidden, bounds)
        return self.forward_loop(hidden, bounds)

    def forward_loop(self, hidden: Tensor, bounds: Int32) -> Tensor:
        """One pair of GEMMs per expert that has rows."""
        limits = bounds.tolist()
        outputs = []
        for expert in np.flatnonzero(np.diff(bounds)).tolist():
            projected = F.linear(hidden[limits[expert] : limits[expert + 1]], self.gate_up[expert])
            if self.biases is not None:  # added afterwards, so that both kernels round alike
                projected += self.biases[0][expert]
            out = F.linear(self.combine(projected), self.down[expert])
            if self.biases is not None:
                out += self.biases[1][expert]
            outputs.append(out)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def forward_grouped(self, hidden: Tensor, bounds: Int32) -> Tensor:
        """Two grouped GEMMs over all experts."""
        ends = torch.from_numpy(bounds[1:]).to(hidden.device)
        projected = F.grouped_mm(hidden, self.gate_up.transpose(1, 2), offs=ends)
        if self.biases is None:
            combined = self.combine(projected)
            return F.grouped_mm(combined, self.down.transpose(1, 2), offs=ends)
        counts = torch.from_numpy(np.diff(bounds).astype(np.int64)).to(hidden.device)
        projected += self.biases[0].repeat_interleave(counts, 0, output_size=hidden.shape[0])
        combined = self.combine(projected)
        out = F.grouped_mm(combined, self.down.transpose(1, 2), offs=ends)
        out += self.biases[1].repeat_interleave(counts, 0, output_size=hidden.shape[0])
        return out

    def calibrate(self) -> None:
        """Find from how many rows on grouped GEMM beats the loop here, and use it from there.

        Only on the CPU, where both give the same bits: two replicas may find different thresholds, and a request
        that moves from one to the other must not notice.
        """
        if self.gate_up.is_cuda or not self._can_group:
            return
        num_experts, hidden_size = self.down.shape[0], self.down.shape[1]
        self.grouped_from_pairs = _NEVER
        for pairs in reversed(_CALIBRATION_PAIRS):
            hidden = torch.zeros(pairs, hidden_size, dtype=self.dtype)
            bounds = np.linspace(0, pairs, num_experts + 1).astype(np.int32)
            loop_s = _best_time_s(lambda h=hidden, b=bounds: self.forward_loop(h, b))  # type: ignore[misc]
            grouped_s = _best_time_s(lambda h=hidden, b=bounds: self.forward_grouped(h, b))  # type: ignore[misc]
            if grouped_s >= 0.95 * loop_s:
                return
            self.grouped_from_pairs = pairs


class GatedExperts(StackedExperts):
    """Gated feed-forward experts: `down(activation(gate(x)) * up(x))`.

    Args:
        gate_up, down: see `StackedExperts`.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: Activation) -> None:
        super().__init__(gate_up, down)
        self._activation = ACTIVATION_FUNCTIONS[activation]

    def _combine(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._activation(gate) * up


class ClampedExperts(StackedExperts):
    """Biased experts with a clamped SwiGLU, as gpt-oss has (see `StackedSpec`).

    Args:
        gate_up, down, biases: see `StackedExperts`.
        alpha: factor inside the sigmoid.
        limit: of the gate from above and of up on both sides.
    """

    def __init__(
        self, gate_up: Tensor, down: Tensor, biases: tuple[Tensor, Tensor], alpha: float, limit: float
    ) -> None:
        super().__init__(gate_up, down, biases)
        self._alpha, self._limit = alpha, limit

    def _combine(self, gate: Tensor, up: Tensor) -> Tensor:
        gate.clamp_(max=self._limit)
        up.clamp_(-self._limit, self._limit)
        # The last bit of a sigmoid depends on where a vector register's end falls. In rows that do not touch each
        # other it falls alike in every row, so that a row's result does not depend on those beside it.
        apart = gate.new_empty(gate.shape[0], gate.shape[1] + 1)[:, :-1]
        torch.mul(gate, self._alpha, out=apart)
        return (up + 1) * (gate * torch.sigmoid(apart))


def _best_time_s(function: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


class CustomExperts(SortedExperts):
    """Experts that are modules of the user's own: each `[tokens, hidden] -> [tokens, hidden]`."""

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
        super().__init__(len(modules))
        self.modules = list(modules)
        self._dtype = dtype

    @property
    def weights_bytes(self) -> int:
        """See `LayerExperts`."""
        return sum(p.nbytes for m in self.modules for p in (*m.parameters(), *m.buffers()))

    @property
    def dtype(self) -> torch.dtype:
        """See `LayerExperts`."""
        return self._dtype

    def forward(self, hidden: Tensor, bounds: Int32) -> Tensor:
        """See the module."""
        outputs = [
            self.modules[expert](hidden[bounds[expert] : bounds[expert + 1]])
            for expert in np.flatnonzero(np.diff(bounds)).tolist()
        ]
        return torch.cat(outputs)
