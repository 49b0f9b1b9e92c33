"""Both ends of a lane: a socket over which two processes on one machine pass dispatches natively, one at a time.

A dispatch that goes through the event loops of both ends costs several times its arithmetic where that is little.
Here the router's thread plans, sends, waits and adds up in one call, and a thread of the group answers, neither
with the interpreter between. The kernels know sockets and numbers; who may open a lane is for `experts.lanes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .kernels import PackedExperts, available, module, threads

# Larger dispatches take long to compute, and the event loop has other work meanwhile.
MAX_HIDDEN_BYTES = 256 * 1024
_NUMBER_BYTES = {torch.float32: 4, torch.bfloat16: 2}
_BATCHES, _ROWS, _PAIRS, _BUSY_NS, _THREADS = range(5)  # fields of `LaneControl`


class LaneTable:
    """A group's side: its layers' experts, and what all lanes together have computed.

    Args:
        layers: layer -> its experts.
    """

    def __init__(self, layers: Mapping[int, PackedExperts]) -> None:
        self._layers = [
            layers[layer].handle if layer in layers else None for layer in range(max(layers, default=-1) + 1)
        ]
        self._kept = dict(layers)
        self._control = np.zeros(5, np.int64)
        self.use_threads(threads())

    def serve(self, descriptor: int) -> None:
        """Answers dispatches on a blocking socket until that ends; the interpreter's lock is free meanwhile."""
        module().serve_lane_on(descriptor, self._layers, self._control.ctypes.data)

    def use_threads(self, count: int) -> None:
        """How many threads each dispatch may use from now on, on open lanes too."""
        self._control[_THREADS] = count

    def counted(self) -> tuple[int, int, int, float]:
        """Batches, rows and pairs computed, and seconds of computing."""
        batches, rows, pairs, busy_ns = self._control[: _BUSY_NS + 1].tolist()
        return batches, rows, pairs, busy_ns / 1e9


class LaneDispatch:
    """A router's side, for all its groups.

    Args:
        group_of, local_of: `[experts]` int16 and int32, as in `routing.plan.Placement`.
        groups: how many there are.

    Attributes:
        expert_pairs, group_rows: counted as in `DispatchStatistics`, of what succeeded here.
        computed_ns: of each group, as it says.
    """

    def __init__(
        self,
        group_of: np.ndarray[tuple[int], np.dtype[np.int16]],
        local_of: np.ndarray[tuple[int], np.dtype[np.int32]],
        groups: int,
    ) -> None:
        self._group_of, self._local_of, self._groups = group_of, local_of, groups
        self._sockets = np.full(groups, -1, np.int32)
        self.expert_pairs = np.zeros(len(group_of), np.int64)
        self.group_rows = np.zeros(groups, np.int64)
        self.computed_ns = np.zeros(groups, np.int64)
        self._fixed = (groups, group_of.ctypes.data, local_of.ctypes.data, len(group_of))
        self._counted = tuple(a.ctypes.data for a in (self.expert_pairs, self.group_rows, self.computed_ns))
        self._sockets_at = self._sockets.ctypes.data
        self._sequence = 0

    def takes(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> bool:
        """Whether a lane carries such rows, ids and weights."""
        return (
            available()
            and hidden.is_cpu
            and hidden.dtype in _NUMBER_BYTES
            and 0 < hidden.nbytes <= MAX_HIDDEN_BYTES
            and hidden.is_contiguous()
            and expert_ids.dtype is torch.int64
            and weights.dtype is torch.float32
            and expert_ids.shape == weights.shape
            and expert_ids.is_cpu
            and weights.is_cpu
            and expert_ids.numel() > 0
        )

    def __call__(
        self,
        sockets: Sequence[int],
        layer: int,
        hidden: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        timeout_s: float,
    ) -> tuple[Tensor, int] | None:
        """Weighted sums `[tokens, hidden]` float32 and the tokens of the most loaded expert; None where a lane
        failed or was late: then none of them may be used again.

        Args:
            sockets: of each group.
            hidden: `[tokens, hidden]` that it `takes`.
            expert_ids, weights: `[tokens, top_k]` int64 and float32.

        Raises:
            IndexError: an id that no expert has; nothing was sent.
        """
        self._sockets[:] = sockets
        self._sequence += 1
        expert_ids, weights = expert_ids.contiguous(), weights.contiguous()
        tokens, width = hidden.shape
        out = torch.empty((tokens, width), dtype=torch.float32)
        largest = module().dispatch(
            self._sockets_at,
            *self._fixed,
            layer,
            tokens,
            expert_ids.shape[1],
            width,
            _NUMBER_BYTES[hidden.dtype],
            expert_ids.data_ptr(),
            weights.data_ptr(),
            hidden.data_ptr(),
            out.data_ptr(),
            max(0, int(1e9 * timeout_s)),
            self._sequence,
            *self._counted,
        )
        if not largest:
            raise IndexError(f"a routing names experts that are not among the {len(self._group_of)}")
        return (out, largest) if largest > 0 else None
