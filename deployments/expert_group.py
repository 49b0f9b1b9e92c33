"""The deployment of one expert group: loads its experts and answers their dispatches over links."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime import garbage
from ..runtime.errors import ConfigurationError
from ..runtime.experts.group import ExpertGroup
from ..runtime.experts.options import DEFAULTS, ExpertOptions
from ..runtime.experts.server import ExpertGroupHandler
from ..runtime.loop_thread import LoopThread
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.families import read_spec
from ..runtime.tensors import torch_dtype
from .autoscaling import LoadMeter
from .replica import LinkConfig, LiveSettings, choose_device, identity, listen

_START_TIMEOUT_S = 30.0
_DRAIN_S = 0.2
CREDITS = 2  # batches that each router may keep in flight on one replica: one computing, one on its way


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """What a group's replica is told; plain values."""

    name: str
    folder: str
    experts: tuple[int, ...]
    dtype: str
    device: str
    threads: int
    options: ExpertOptions = DEFAULTS


class ExpertGroupReplica:
    """One replica of one expert group. Serve calls the methods; tokens come over links."""

    def __init__(self, config: GroupConfig, links: LinkConfig) -> None:
        torch.set_num_threads(config.threads)
        device = choose_device(config.device)
        checkpoint = Checkpoint(config.folder)
        spec = read_spec(checkpoint)
        dtype = torch_dtype(config.dtype)
        group = ExpertGroup.load(checkpoint, spec.experts, config.experts, dtype, device, config.options)
        self._config = config
        self._fingerprint = checkpoint.fingerprint()
        self._load = LoadMeter()
        self._live = LiveSettings({"threads": config.threads})
        self._handler = ExpertGroupHandler(group, device)
        # A thread of its own: computing must not hold up Serve's health checks.
        self._thread = LoopThread(config.name)
        self._server = self._thread.run(
            listen(links, self._handler, links.limits, CREDITS, config.name), _START_TIMEOUT_S
        )
        garbage.settle()

    def describe(self) -> dict[str, Any]:
        """For discovery and the status page; called by broadcast."""
        return {
            **identity(self._server.addresses),
            "name": self._config.name,
            "fingerprint": self._fingerprint,
            **self._handler.describe(),
            "refused_settings": self._live.refused,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The share of time spent computing; called by Serve when the deployment scales by itself."""
        return self._load.read(self._handler.group.statistics().busy_s)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Live settings: `threads`; see `LiveSettings`."""
        self._live.take(user_config, self._change)

    def _change(self, user_config: Mapping[str, Any]) -> None:
        threads = int(user_config.get("threads", self._config.threads))
        if threads < 1:
            raise ConfigurationError(f"threads is {threads}; it must be at least 1", "threads")
        self._thread.submit(self._use_threads(threads))  # between two batches: nobody waits for that

    async def _use_threads(self, count: int) -> None:
        self._handler.group.use_threads(count)

    def check_health(self) -> None:
        """Raises: UnavailableError when the computing thread is dead."""
        self._thread.check()

    async def __del__(self) -> None:
        """Called by Serve when the replica is drained and stops."""
        if hasattr(self, "_server"):
            self._thread.run(self._stop(), _START_TIMEOUT_S)
            self._thread.close()

    async def _stop(self) -> None:
        self._server.drain()  # routers send their next dispatches elsewhere ...
        await asyncio.sleep(_DRAIN_S)  # ... and what is on its way is still answered
        self._handler.close()
        await self._server.close()
