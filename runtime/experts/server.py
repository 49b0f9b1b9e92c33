"""A group's end of its links: frames in, `ExpertGroup.forward`, frames out. And who asks for a lane gets one."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..errors import DeadlineExceededError, InvalidRequestError
from ..links import Call, Packed, Reply
from .group import ExpertGroup
from .lanes import METHOD as LANE_METHOD
from .lanes import LaneServer
from .wire import pack_sums, unpack_rows

METHOD = "experts"


class ExpertGroupHandler:
    """Answers packed calls of method "experts"; see `wire`.

    Computes on the event loop's own thread: a link server of a group has a thread of its own, and a hop to
    another one would cost more than most decode batches.
    """

    def __init__(self, group: ExpertGroup, device: str = "cpu") -> None:
        self.group = group
        self._lanes = None if group.lanes is None else LaneServer(group.lanes)
        self.device = torch.device(device)

    def __call__(self, call: Call) -> Packed | Reply:
        """See `LinkServer`.

        Raises:
            InvalidRequestError, InvalidTensorError: the call does not fit the group.
            DeadlineExceededError: its time ran out while others were computed; nothing is spent on it.
        """
        if call.method == LANE_METHOD:
            return Reply({} if self._lanes is None else self._lanes.offer())
        if call.method != METHOD or call.packed is None:
            raise InvalidRequestError(f"an expert group answers packed calls of {METHOD!r}, not {call.method!r}")
        started = time.monotonic()
        if started >= call.deadline:
            raise DeadlineExceededError("the dispatch came too late")
        layer, rows = unpack_rows(call.packed, self.device)
        sums = self.group.forward(layer, rows)
        return pack_sums(sums, time.monotonic() - started)

    def close(self) -> None:
        """Ends all lanes; links are the server's."""
        if self._lanes is not None:
            self._lanes.close()

    def describe(self) -> dict[str, Any]:
        """What discovery tells routers and the status page of this group."""
        return {
            "experts": self.group.experts,
            "kernels": self.group.kernels,
            "weights_bytes": self.group.weights_bytes,
            "statistics": self.group.statistics()._asdict(),
        }
