"""A group's end of its links: frames in, `ExpertGroup.forward`, frames out."""

from __future__ import annotations

import time
from typing import Any, cast

import torch

from ..errors import DeadlineExceededError, InvalidRequestError
from ..links import Call, Reply
from ..routing.plan import ExpertRows, Float32, Int32
from ..tensors import array_from_wire, from_wire, to_wire
from .group import ExpertGroup

METHOD = "experts"
COMPUTED_S = "s"  # in the answer's meta: seconds of computing


class ExpertGroupHandler:
    """Answers calls of method "experts": meta `{"layer"}`, tensors hidden, offsets, experts, weights.

    Computes on the event loop's own thread: a link server of a group has a thread of its own, and a hop to
    another one would cost more than most decode batches.
    """

    def __init__(self, group: ExpertGroup, device: str = "cpu") -> None:
        self.group = group
        self.device = torch.device(device)

    def __call__(self, call: Call) -> Reply:
        """See `LinkServer`.

        Raises:
            InvalidRequestError, InvalidTensorError: the call does not fit the group.
            DeadlineExceededError: its time ran out while others were computed; nothing is spent on it.
        """
        if call.method != METHOD or len(call.tensors) != 4:
            raise InvalidRequestError(f"an expert group answers {METHOD!r} with 4 tensors, not {call.method!r}")
        if time.monotonic() >= call.deadline:
            raise DeadlineExceededError("the dispatch came too late")
        hidden, offsets, experts, weights = call.tensors
        rows = ExpertRows(
            from_wire(hidden, self.device),
            cast(Int32, array_from_wire(offsets)),
            cast(Int32, array_from_wire(experts)),
            cast(Float32, array_from_wire(weights)),
        )
        started = time.monotonic()
        sums = self.group.forward(int(call.meta["layer"]), rows)
        return Reply({COMPUTED_S: time.monotonic() - started}, [to_wire(sums)])

    def describe(self) -> dict[str, Any]:
        """What discovery tells routers and the status page of this group."""
        return {
            "experts": self.group.experts,
            "weights_bytes": self.group.weights_bytes,
            "statistics": self.group.statistics()._asdict(),
        }
