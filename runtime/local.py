"""A whole model on this machine without Ray: its groups in this process, or each in a process of its own.

    async with await LocalRuntime.start(folder, groups=2) as runtime:
        async for chunk in runtime.router.generate(GenerateRequest("1", prompt_token_ids)):
            ...

Tests use it, and benchmarks, as the limit that the served application is measured against.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from .experts.client import LocalGroup, RemoteGroup
from .experts.group import ExpertGroup
from .experts.process import GroupProcess, GroupProcessConfig
from .links import Endpoint, LinkPool
from .links.authentication import new_secret
from .model.checkpoint import Checkpoint
from .model.families import read_spec
from .model.loading import load_trunk
from .router.limits import RouterLimits
from .router.router import Router
from .routing.dispatch import Dispatcher, GroupBackend
from .routing.plan import contiguous_placement
from .tensors import torch_dtype

Isolation = Literal["in-process", "processes"]


class LocalRuntime:
    """A router and its expert groups. Made by `start`, on the running event loop; `close` it.

    Attributes:
        router: the backend.
        processes: the groups' processes, group by group, when they have their own.
    """

    def __init__(
        self, router: Router, pools: Sequence[LinkPool] = (), processes: Sequence[list[GroupProcess]] = ()
    ) -> None:
        self.router = router
        self.pools = pools
        self.processes = processes

    @classmethod
    async def start(
        cls,
        folder: Path,
        groups: int = 1,
        isolation: Isolation = "in-process",
        replicas: int = 1,
        name: str | None = None,
        dtype: str | None = None,
        limits: RouterLimits | None = None,
    ) -> LocalRuntime:
        """Load and start everything.

        Args:
            groups: how many expert groups the experts are split into.
            replicas: processes of each group; only with `isolation="processes"`.

        Raises:
            CheckpointError, UnknownFamilyError, ConfigurationError.
        """
        trunk = load_trunk(folder, name, dtype)
        placement = contiguous_placement(trunk.info.num_experts, groups)
        pools: list[LinkPool] = []
        processes: list[list[GroupProcess]] = []
        backends: list[GroupBackend]
        if isolation == "in-process":
            backends = [_load_group(folder, experts, trunk.info.dtype) for experts in placement.groups]
        else:
            secret = new_secret()
            configs = [
                GroupProcessConfig(f"group-{index}", str(folder), experts, trunk.info.dtype, secret)
                for index, experts in enumerate(placement.groups)
            ]
            processes = [[await GroupProcess.start(c) for _ in range(replicas)] for c in configs]
            pools = [_pool(c.name, group, secret) for c, group in zip(configs, processes, strict=True)]
            await asyncio.gather(*(pool.start() for pool in pools))
            backends = [RemoteGroup(pool) for pool in pools]
        dispatcher = Dispatcher(placement, backends)
        router = Router(trunk.info, trunk.gates, dispatcher, trunk.decoder, limits or RouterLimits())
        router.start()
        return cls(router, pools, processes)

    async def close(self) -> None:
        """Stop the router, the links and the processes."""
        await self.router.close()
        for pool in self.pools:
            await pool.close()
        await asyncio.gather(*(process.close() for group in self.processes for process in group))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _load_group(folder: Path, experts: Sequence[int], dtype: str) -> LocalGroup:
    checkpoint = Checkpoint(folder)
    return LocalGroup(ExpertGroup.load(checkpoint, read_spec(checkpoint).experts, experts, torch_dtype(dtype)))


def _pool(name: str, processes: Sequence[GroupProcess], secret: str) -> LinkPool:
    async def discover() -> Sequence[Endpoint]:
        return [process.endpoint for process in processes if process.alive]

    return LinkPool(name, discover, secret.encode(), socket.gethostname())
