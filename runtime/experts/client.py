"""The router's ends of an expert group: over links to its replicas, or in this process."""

from __future__ import annotations

import time

from torch import Tensor

from ..errors import DeadlineExceededError, LinkProtocolError
from ..links import LinkPool
from ..routing.plan import ExpertRows
from ..tensors import array_to_wire, from_wire, to_wire
from .group import ExpertGroup
from .server import COMPUTED_S, METHOD


class RemoteGroup:
    """A group behind a pool of links. Experts hold no state of a request, so a dispatch may be sent again."""

    def __init__(self, pool: LinkPool) -> None:
        self.pool = pool
        self._computed_s = 0.0

    @property
    def replicas(self) -> int:
        """See `GroupBackend`."""
        return max(1, len(self.pool.links))

    @property
    def computed_s(self) -> float | None:
        """See `GroupBackend`."""
        return self._computed_s

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        tensors = [
            to_wire(rows.hidden),
            array_to_wire(rows.offsets),
            array_to_wire(rows.experts),
            array_to_wire(rows.weights),
        ]
        reply = await self.pool.call(METHOD, {"layer": layer}, tensors, deadline)
        if len(reply.tensors) != 1 or reply.tensors[0].shape != tuple(rows.hidden.shape):
            raise LinkProtocolError(f"{self.pool.name} answered with other tensors than were asked for")
        self._computed_s += reply.meta.get(COMPUTED_S, 0.0)
        return from_wire(reply.tensors[0], rows.hidden.device)


class LocalGroup:
    """A group in this process, computed where it is called."""

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group

    @property
    def replicas(self) -> int:
        """See `GroupBackend`."""
        return 1

    @property
    def computed_s(self) -> float | None:
        """See `GroupBackend`."""
        return None

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        if time.monotonic() >= deadline:
            raise DeadlineExceededError("the dispatch came too late")
        return self.group.forward(layer, rows)
