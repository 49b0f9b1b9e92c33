"""The deployment of the router: trunk and gates, links to all expert groups, a link server for gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..runtime import garbage
from ..runtime.experts.client import RemoteGroup
from ..runtime.links import LinkPool, LinkServer
from ..runtime.loop_thread import LoopThread
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.loading import load_trunk
from ..runtime.native import kernels
from ..runtime.router.limits import RouterLimits
from ..runtime.router.router import Router
from ..runtime.router.server import RouterHandler
from ..runtime.routing.dispatch import Dispatcher
from ..runtime.routing.plan import Placement
from .autoscaling import LoadMeter
from .replica import LinkConfig, LiveSettings, choose_device, identity, listen, make_pool
from .settings import BatchSettings, QueueSettings

_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What a router's replica is told; plain values."""

    name: str
    folder: str
    dtype: str
    device: str
    threads: int
    groups: tuple[tuple[str, tuple[int, ...]], ...]  # name and experts of each
    limits: RouterLimits
    live: Mapping[str, Any]  # see `LiveSettings`
    batch_invariant: bool = False


class RouterReplica:
    """One replica of the router. Serve calls the methods; requests come over links."""

    def __init__(self, config: RouterConfig, links: LinkConfig, group_handles: list[Any]) -> None:
        torch.set_num_threads(config.threads)
        kernels.use_all_cores()
        self._config = config
        self._device = choose_device(config.device)
        self._trunk = load_trunk(
            Path(config.folder), config.name, config.dtype, self._device, config.batch_invariant
        )
        self._fingerprint = Checkpoint(config.folder).fingerprint()
        self._load = LoadMeter()
        self._live = LiveSettings(config.live)
        self._thread = LoopThread("router")
        self._thread.run(self._start(links, group_handles), _START_TIMEOUT_S)
        garbage.settle()

    async def _start(self, links: LinkConfig, group_handles: list[Any]) -> None:
        names = [name for name, _ in self._config.groups]
        self._pools = [
            make_pool(name, handle, links, self._holds_our_weights)
            for name, handle in zip(names, group_handles, strict=True)
        ]
        await asyncio.gather(*(pool.start() for pool in self._pools))
        placement = Placement([experts for _, experts in self._config.groups])
        dispatcher = Dispatcher(placement, [RemoteGroup(pool) for pool in self._pools])
        trunk = self._trunk
        self._router = Router(
            trunk.info,
            trunk.gates,
            dispatcher,
            trunk.decoder,
            self._config.limits,
            self._device,
            Path(self._config.folder),
        )
        self._router.start()
        # Its queue bounds what it accepts: a gateway needs no credits.
        self._server: LinkServer = await listen(links, RouterHandler(self._router), links.limits, None, "router")

    def _holds_our_weights(self, found: dict[str, Any]) -> bool:
        """A replica that read another checkpoint would answer, and wrongly."""
        return bool(found["fingerprint"] == self._fingerprint)

    def describe(self) -> dict[str, Any]:
        """For discovery and the status page; called by broadcast."""
        return {
            **identity(self._server.addresses),
            "model": self._router.model.to_wire(),
            "weights_bytes": self._trunk.weights_bytes,
            "groups": [_describe_pool(pool) for pool in self._pools],
            "refused_settings": self._live.refused,
            "statistics": self._router.statistics(),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The share of time spent in steps; called by Serve when the deployment scales by itself."""
        return self._load.read(self._router.busy_s())

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Live settings: `batching` and `queue`, as in the application's settings; see `LiveSettings`."""
        self._live.take(user_config, self._change)

    def _change(self, user_config: Mapping[str, Any]) -> None:
        changes: list[Callable[[], None]] = []
        if "queue" in user_config:
            queue = QueueSettings.model_validate(user_config["queue"]).to_limits()
            changes.append(partial(self._router.set_queue_limits, queue))
        if "batching" in user_config:
            batching = BatchSettings.model_validate(user_config["batching"]).to_limits()
            changes.append(partial(self._router.set_batch_limits, batching))
        for change in changes:
            self._thread.loop.call_soon_threadsafe(change)

    def check_health(self) -> None:
        """Raises: UnavailableError when the computing thread, or a loop on it, is dead."""
        self._thread.check()
        self._router.check()

    async def __del__(self) -> None:
        """Called by Serve when the replica is drained and stops."""
        if hasattr(self, "_server"):
            self._thread.run(self._stop(), _START_TIMEOUT_S)
            self._thread.close()

    async def _stop(self) -> None:
        self._server.drain()
        await self._router.close()
        await self._server.close()
        await asyncio.gather(*(pool.close() for pool in self._pools))


def _describe_pool(pool: LinkPool) -> dict[str, Any]:
    return {"name": pool.name, **pool.statistics()._asdict()}
