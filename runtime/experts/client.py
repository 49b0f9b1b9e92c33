"""The router's ends of an expert group: over links to its replicas, or in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..errors import DeadlineExceededError, LinkProtocolError
from ..links import LinkPool, Packed, SentCall
from ..links.pool import PooledLink
from ..routing.plan import ExpertRows
from .group import ExpertGroup
from .lanes import Lane
from .server import METHOD
from .wire import pack_rows, unpack_sums

Done = Callable[[Tensor | BaseException], None]


class RemoteGroup:
    """A group behind a pool of links. Experts hold no state of a request, so a dispatch may be sent again."""

    def __init__(self, pool: LinkPool) -> None:
        self.pool = pool
        self._computed_s = 0.0
        self._lanes: dict[PooledLink, Lane] = {}

    @property
    def replicas(self) -> int:
        """See `GroupBackend`."""
        return max(1, len(self.pool.links))

    @property
    def computed_s(self) -> float | None:
        """See `GroupBackend`."""
        return self._computed_s

    def lane(self) -> Lane | None:
        """See `LaneBackend`."""
        link = self.pool.free_link()
        if link is None or not link.client.address.startswith("unix:"):  # one on another machine
            return None
        if (lane := self._lanes.get(link)) is None:
            link.companions.append(partial(self._lanes.__delitem__, link))
        if lane is None or lane.may_be_replaced:
            lane = self._lanes[link] = Lane(link)
        return lane

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        return self._sums(await self.pool.call_packed(METHOD, pack_rows(layer, rows), deadline), rows.hidden)

    def send(self, layer: int, rows: ExpertRows, deadline: float, done: Done) -> SentCall:
        """See `SendingBackend`."""
        answered = partial(self._answered, rows.hidden, done)
        return self.pool.send(METHOD, pack_rows(layer, rows), deadline, answered)

    def _answered(self, asked: Tensor, done: Done, outcome: Packed | BaseException) -> None:
        if isinstance(outcome, BaseException):
            done(outcome)
            return
        try:
            sums = self._sums(outcome, asked)
        except LinkProtocolError as error:
            done(error)
        else:
            done(sums)

    def _sums(self, answer: Packed, asked: Tensor) -> Tensor:
        try:
            sums, computed_s = unpack_sums(answer, asked)
        except LinkProtocolError as error:
            raise LinkProtocolError(f"{self.pool.name}: {error}") from error
        self._computed_s += computed_s
        return sums


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
