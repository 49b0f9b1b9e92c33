"""A whole model on this machine without Ray: its groups in this process, or each in a process of its own.

    async with await LocalRuntime.start(folder, groups=2) as runtime:
        async for chunk in runtime.router.generate(GenerateRequest("1", prompt_token_ids)):
            ...

Tests use it, and benchmarks, as the limit that the served application is measured against.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from .experts.client import LocalGroup, RemoteGroup
from .experts.group import ExpertGroup
from .experts.options import ExpertOptions, Quantization
from .experts.process import GroupProcess, GroupProcessConfig
from .links import Endpoint, LinkPool
from .links.authentication import new_secret
from .model.checkpoint import Checkpoint
from .model.families import read_spec
from .model.loading import load_trunk
from .native import kernels
from .router.limits import RouterLimits
from .router.router import Router
from .routing.dispatch import Dispatcher, GroupBackend
from .routing.plan import contiguous_placement
from .tasks import gather_or_cancel
from .tensors import torch_dtype

Isolation = Literal["in-process", "processes"]


class LocalRuntime:
    """A router and its expert groups. Made by `start`, on the running event loop; `close` it.

    Attributes:
        router: the backend.
        pools: links to the groups' processes, group by group, when they have their own.
        processes: those processes.
    """

    def __init__(
        self,
        router: Router,
        pools: Sequence[LinkPool],
        processes: Sequence[Sequence[GroupProcess]],
        cleanup: contextlib.AsyncExitStack,
    ) -> None:
        self.router = router
        self.pools = pools
        self.processes = processes
        self._cleanup = cleanup

    @classmethod
    async def start(
        cls,
        folder: Path,
        groups: int = 1,
        isolation: Isolation = "in-process",
        replicas: int = 1,
        name: str | None = None,
        dtype: str | None = None,
        batch_invariant: bool = False,
        expert_quantization: Quantization | None = None,
        device: str = "cpu",
        limits: RouterLimits | None = None,
    ) -> LocalRuntime:
        """Load and start everything. What was started is stopped again when something fails.

        Args:
            groups: how many expert groups the experts are split into.
            replicas: processes of each group; only with `isolation="processes"`.
            batch_invariant: see `Decoder.load`.
            expert_quantization: see `ExpertOptions`.
            device: where trunk and experts compute, such as "cuda:0"; groups in processes of their own share it.

        Raises:
            CheckpointError, UnknownFamilyError, ConfigurationError.
        """
        options = ExpertOptions(batch_invariant, expert_quantization)
        trunk = load_trunk(folder, name, dtype, device, batch_invariant)
        placement = contiguous_placement(trunk.info.num_experts, groups)
        async with contextlib.AsyncExitStack() as cleanup:
            pools: list[LinkPool] = []
            processes: list[list[GroupProcess]] = []
            backends: list[GroupBackend]
            if isolation == "in-process":
                backends = [
                    _load_group(folder, experts, trunk.info.dtype, device, options) for experts in placement.groups
                ]
            else:
                secret = new_secret()
                configs = [
                    GroupProcessConfig(
                        f"group-{index}", str(folder), experts, trunk.info.dtype, secret, 1, options, device
                    )
                    for index, experts in enumerate(placement.groups)
                ]
                kernels.use_all_cores()
                processes = await _start_processes(configs, replicas, cleanup)
                pools = [_pool(c.name, group, secret) for c, group in zip(configs, processes, strict=True)]
                for pool in pools:
                    cleanup.push_async_callback(pool.close)
                    await pool.start()
                backends = [RemoteGroup(pool) for pool in pools]
            dispatcher = Dispatcher(placement, backends)
            limits = limits or RouterLimits()
            router = Router(trunk.info, trunk.gates, dispatcher, trunk.decoder, limits, device, folder)
            cleanup.push_async_callback(router.close)
            router.start()
            return cls(router, pools, processes, cleanup.pop_all())

    async def close(self) -> None:
        """Stop the router, the links and the processes."""
        await self._cleanup.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _load_group(
    folder: Path, experts: Sequence[int], dtype: str, device: str, options: ExpertOptions
) -> LocalGroup:
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint).experts
    group = ExpertGroup.load(checkpoint, spec, experts, torch_dtype(dtype), device, options)
    return LocalGroup(group)


async def _start_processes(
    configs: Sequence[GroupProcessConfig], replicas: int, cleanup: contextlib.AsyncExitStack
) -> list[list[GroupProcess]]:
    """`replicas` processes for each config, all at once: each takes seconds to import torch."""
    started: list[GroupProcess] = []
    cleanup.push_async_callback(_close_all, started)

    async def start(config: GroupProcessConfig) -> GroupProcess:
        started.append(process := await GroupProcess.start(config))
        return process

    flat = await gather_or_cancel([start(config) for config in configs for _ in range(replicas)])
    return [flat[first : first + replicas] for first in range(0, len(flat), replicas)]


async def _close_all(processes: Sequence[GroupProcess]) -> None:
    await asyncio.gather(*(process.close() for process in processes))


def _pool(name: str, processes: Sequence[GroupProcess], secret: str) -> LinkPool:
    async def discover() -> Sequence[Endpoint]:
        return [process.endpoint for process in processes if process.alive]

    return LinkPool(name, discover, secret.encode(), socket.gethostname())
