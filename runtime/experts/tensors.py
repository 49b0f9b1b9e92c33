"""One expert's tensors, as they come out of a checkpoint of any family."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExpertTensors(NamedTuple):
    """A gated expert: `gate_up [2 * intermediate, hidden]` with gate first, `down [hidden, intermediate]`, and the
    biases of both where it has any."""

    gate_up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor] | None = None
