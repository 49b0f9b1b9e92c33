"""A client's links to all replicas of one deployment: discovery, credits, choice of replica, failover."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl as tls
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..errors import (
    DeadlineExceededError,
    LinkError,
    PimoeError,
    RequestCancelledError,
    UnavailableError,
)
from ..requests import TensorData
from .addresses import Endpoint, choose_address
from .client import LinkClient
from .connection import LinkLimits
from .messages import Packed, Reply
from .sent import SentCall

_log = logging.getLogger(__name__)

# A call that kills whoever computes it must not go through all replicas, and again through their successors.
MAX_LOST_REPLICAS = 4

_ALONE_S = 0.2  # between two rounds while no replica is linked: calls wait for the next

Discover = Callable[[], Awaitable[Sequence[Endpoint]]]
R = TypeVar("R")


class PoolStatistics(NamedTuple):
    """Replicas with an open link, calls in flight on them, and calls sent again since start."""

    replicas: int
    in_flight: int
    resent: int


class PooledLink:
    """A link and the replica behind it.

    Attributes:
        in_flight: calls of this pool that hold one of the replica's credits.
        named: whether the last discovery named the replica; one that it leaves out is about to stop.
        companions: called when the link is gone, for what lives as long as it does.
    """

    def __init__(self, endpoint: Endpoint, client: LinkClient) -> None:
        self.endpoint = endpoint
        self.client = client
        self.in_flight = 0
        self.named = True
        self.companions: list[Callable[[], None]] = []
        self._received_when_silent = -1

    @property
    def usable(self) -> bool:
        """Whether the replica takes new calls, now or once it has a credit."""
        return self.named and not self.client.closed and not self.client.draining

    @property
    def available(self) -> bool:
        """Whether one more call may be sent now."""
        return self.usable and (self.client.credits is None or self.in_flight < self.client.credits)

    @property
    def silent(self) -> bool:
        """Whether nothing came from the replica since it left a call unanswered."""
        return self.client.received == self._received_when_silent

    def left_unanswered(self) -> None:
        """An attempt's time ran out: siblings go first until the replica is heard of again."""
        self._received_when_silent = self.client.received


def _nobody() -> None:
    """What nobody wants to be told."""


class LinkPool:
    """Keeps one link to every replica that `discover` names: asks about once a second, and at once when a link
    breaks, so that a dead replica's work moves to a sibling immediately and to its successor once that is up.

    Args:
        name: what the replicas are, for messages.
        discover: returns the live replicas; may fail, and is then asked again.
        refresh_s: seconds between two rounds of discovery; at most 0.2 while no replica is linked.
        attempt_timeout_s: after so long without an answer a call is sent to another replica.
    """

    def __init__(
        self,
        name: str,
        discover: Discover,
        secret: bytes,
        node_id: str,
        limits: LinkLimits | None = None,
        refresh_s: float = 1.0,
        attempt_timeout_s: float = 30.0,
        ssl: tls.SSLContext | None = None,
    ) -> None:
        self.name = name
        self.endpoints: dict[str, Endpoint] = {}
        self.links: dict[str, PooledLink] = {}
        self.resent = 0
        self.on_change: Callable[[], None] = _nobody
        self._discover = discover
        self._secret, self._node_id, self._limits, self._ssl = secret, node_id, limits or LinkLimits(), ssl
        self._refresh_s, self._attempt_timeout_s = refresh_s, attempt_timeout_s
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._started = asyncio.Event()
        self._closed = False
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._warned: set[str] = set()  # replicas that cannot be linked to
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Discover and connect; then keep doing so in the background. A second call waits for the first."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_refreshing(), name=f"pool {self.name}")
        await self._started.wait()
        if self._connecting:
            await asyncio.wait(list(self._connecting.values()))

    async def close(self) -> None:
        """Stop and close every link; calls, those that wait for a replica too, fail at once."""
        self._closed = True
        tasks = [*self._connecting.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._started.set()
        for link in list(self.links.values()):
            await link.client.close()
        self.links.clear()
        self._notify()

    def statistics(self) -> PoolStatistics:
        """See `PoolStatistics`."""
        links = self.links.values()
        return PoolStatistics(len(links), sum(link.in_flight for link in links), self.resent)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until at least one replica is linked.

        Raises:
            UnavailableError: none within `timeout_s`.
        """
        async with self.acquire(asyncio.get_running_loop().time() + timeout_s):
            pass

    @contextlib.asynccontextmanager
    async def acquire(self, deadline: float) -> AsyncIterator[PooledLink]:
        """Hold one credit of the least busy replica, waiting for one until `deadline` (`loop.time()`).

        Raises:
            UnavailableError: no replica lives, or the pool was closed.
            DeadlineExceededError: replicas live, but none had a credit in time.
        """
        link = await self._choose(deadline)
        self.take(link)
        try:
            yield link
        finally:
            self.release(link)

    async def call(
        self, method: str, meta: dict[str, Any], tensors: Sequence[TensorData], deadline: float
    ) -> Reply:
        """Call any replica; when it dies, drains or stays silent, call another, until `deadline` (`loop.time()`).

        Only for work that may be done twice.

        Raises:
            UnavailableError: no replica lived until the deadline, or too many were lost with the call on them.
            DeadlineExceededError: the time ran out with a replica at work.
            PimoeError: what the handler raised.
        """
        return await self._call_any(lambda client, s: client.call(method, meta, tensors, s), deadline, 0)

    async def call_packed(self, method: str, packed: Packed, deadline: float, lost: int = 0) -> Packed:
        """As `call`, with a packed request and answer.

        Args:
            lost: replicas that were lost with the call on them before.

        Raises: as `call`.
        """
        return await self._call_any(lambda client, s: client.call_packed(method, packed, s), deadline, lost)

    def send(
        self, method: str, packed: Packed, deadline: float, done: Callable[[Packed | BaseException], None]
    ) -> SentCall:
        """As `call_packed`, but it is on its way when this returns, and `done` is told the outcome."""
        return SentCall(self, method, packed, deadline, done)

    async def _call_any(
        self, attempt: Callable[[LinkClient, float], Awaitable[R]], deadline: float, lost: int
    ) -> R:
        loop = asyncio.get_running_loop()
        while True:
            link = self.free_link() or await self._choose(deadline)
            self.take(link)
            remaining_s = deadline - loop.time()
            attempt_s = min(remaining_s, self._attempt_timeout_s)
            try:
                return await attempt(link.client, attempt_s)
            except PimoeError as error:
                if not self.excuses(link, error, attempt_s >= remaining_s or deadline <= loop.time()):
                    raise
                lost = self.count_lost(link, error, lost)
            finally:
                self.release(link)

    def excuses(self, link: PooledLink, error: PimoeError, is_last: bool) -> bool:
        """Whether another replica may do better than the one behind `link`, which answered with `error`.

        Args:
            is_last: no time is left for another attempt.
        """
        replica = link.endpoint.replica_id
        if isinstance(error, LinkError):
            if not link.client.closed:
                return False  # the handler's, or this end's: the link itself is well
            _log.warning("%s: replica %s lost (%s)", self.name, replica, error)
            return True
        if isinstance(error, UnavailableError | RequestCancelledError):
            if not link.client.draining:
                return False  # it speaks of others behind it
            _log.info("%s: replica %s drains", self.name, replica)
            return True
        if not isinstance(error, DeadlineExceededError) or is_last:
            return False
        _log.warning("%s: replica %s is silent", self.name, replica)
        link.left_unanswered()
        return True

    def count_lost(self, link: PooledLink, error: PimoeError, lost: int) -> int:
        """The replicas lost so far with a call on them that is about to be sent again.

        Raises:
            UnavailableError: they are too many.
        """
        lost += isinstance(error, LinkError)
        if lost == MAX_LOST_REPLICAS:
            raise UnavailableError(f"{self.name}: {lost} replicas were lost with this call on them") from error
        self.resent += 1
        return lost

    def attempt_deadline(self, deadline: float) -> float | None:
        """Until when one replica may take for a call; None when no time is left."""
        now = asyncio.get_running_loop().time()
        return min(deadline, now + self._attempt_timeout_s) if now < deadline else None

    def take(self, link: PooledLink) -> None:
        """One more call is on `link`."""
        link.in_flight += 1

    def release(self, link: PooledLink) -> None:
        """A call on `link` has ended."""
        link.in_flight -= 1
        self._notify()

    def forget(self, link: PooledLink) -> None:
        """Give up a link that is broken, or whose replica talks nonsense, and look for replicas at once."""
        if self.links.get(link.endpoint.replica_id) is link:
            del self.links[link.endpoint.replica_id]
        link.client.abort()
        while link.companions:
            link.companions.pop()()
        self._wake.set()
        self._notify()

    def free_link(self) -> PooledLink | None:
        """The least busy replica that may be sent a call now."""
        if len(self.links) == 1:
            (link,) = self.links.values()
            return link if link.available else None
        available = [link for link in self.links.values() if link.available]
        return min(available, key=lambda link: (link.silent, link.in_flight), default=None)

    async def _choose(self, deadline: float) -> PooledLink:
        loop = asyncio.get_running_loop()
        while not self._closed:
            if (link := self.free_link()) is not None:
                return link
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise self._too_late() from None
            if loop.time() >= deadline:  # woken, but too late
                raise self._too_late()
        raise UnavailableError(f"{self.name}: this end is shutting down")

    def _too_late(self) -> PimoeError:
        if any(link.usable for link in self.links.values()):
            return DeadlineExceededError(f"{self.name}: no replica was free in time")
        return UnavailableError(f"{self.name}: no live replica", retry_after_s=2 * self._refresh_s)

    def _notify(self) -> None:
        self._changed.set()
        if self.on_change is not _nobody:
            asyncio.get_running_loop().call_soon(
                self.on_change
            )  # what it raises must not reach calls or discovery

    async def _keep_refreshing(self) -> None:
        while True:
            woken = self._wake.is_set()
            self._wake.clear()
            await self._refresh()
            self._started.set()
            if woken:
                # After a death discovery may name the dead for an instant: do not spin on it.
                await asyncio.sleep(min(0.1, self._refresh_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_s if self.links else min(_ALONE_S, self._refresh_s)):
                    await self._wake.wait()

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(max(5.0, 5 * self._refresh_s)):
                endpoints = {endpoint.replica_id: endpoint for endpoint in await self._discover()}
        except Exception as error:  # discovery crosses processes and may fail in any way; links live on
            _log.info("%s: discovery failed, asking again: %s", self.name, error)
            return
        self.endpoints = endpoints
        self._warned &= endpoints.keys()
        for replica_id, link in list(self.links.items()):
            link.named = replica_id in endpoints
            if link.named:
                link.endpoint = endpoints[replica_id]
            elif not link.in_flight:
                await link.client.close()
        for replica_id, endpoint in endpoints.items():
            if replica_id not in self.links and replica_id not in self._connecting:
                # In a task of its own: a replica that does not answer must not keep others from being found.
                task = self._connecting[replica_id] = asyncio.create_task(self._connect(endpoint))
                task.add_done_callback(partial(self._connected, replica_id))
        self._notify()

    def _connected(self, replica_id: str, task: asyncio.Task[None]) -> None:
        del self._connecting[replica_id]

    def _warn(self, endpoint: Endpoint, why: str) -> None:
        """Once: it is tried again several times a second."""
        level = logging.DEBUG if endpoint.replica_id in self._warned else logging.WARNING
        self._warned.add(endpoint.replica_id)
        _log.log(level, "%s: replica %s %s", self.name, endpoint.replica_id, why)

    async def _connect(self, endpoint: Endpoint) -> None:
        address = choose_address(endpoint, self._node_id)
        if address is None:
            self._warn(endpoint, "has no address reachable from here")
            return
        try:
            client = await LinkClient.connect(address, self._secret, self._limits, self._ssl)
        except Exception as error:  # what an odd address leads to is its own replica's matter
            self._warn(endpoint, f"cannot be linked to: {error}")
            return
        link = self.links[endpoint.replica_id] = PooledLink(endpoint, client)
        client.on_closed = lambda: self.forget(link)
        client.on_credits = self._notify
        self._notify()
