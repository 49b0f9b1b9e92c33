"""What `dispatch.py` deploys: expert groups that answer over links, Serve handles and ZeroMQ, plain actors, and a
replica that stands where the router stands and calls them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dispatch_echo import (
    ACTOR,
    GENERIC,
    HANDLE,
    LANE,
    LINK,
    SOCKET,
    TIMEOUT_S,
    ZMQ,
    Check,
    ZmqEcho,
    generic_echo,
    link_echo,
    open_dealers,
    payload,
    ray_echo,
    same_bytes,
    same_length,
    without_zmq,
    zmq_echo,
)
from dispatch_timing import timed_over_lanes
from numpy.typing import NDArray
from pimoe.deployments.expert_group import ExpertGroupReplica, GroupConfig
from pimoe.deployments.replica import LinkConfig, make_pool
from pimoe.runtime import garbage
from pimoe.runtime.experts.client import LocalGroup, RemoteGroup
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.links import Call, LinkLimits, Packed, Reply
from pimoe.runtime.links.authentication import new_secret
from pimoe.runtime.loop_thread import LoopThread
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.layer_model import load_gate
from pimoe.runtime.model.loading import load_trunk
from pimoe.runtime.model.spec import LayerSpec
from pimoe.runtime.routing.dispatch import Dispatched, Dispatcher, GroupBackend
from pimoe.runtime.routing.plan import ExpertRows, Placement, contiguous_placement
from pimoe.runtime.routing.strategies import Routing
from pimoe.runtime.tensors import torch_dtype
from rounds import timed
from torch import Tensor

IN_PROCESS = "in-process"
LAYER = 0


class MeasuredGroup(ExpertGroupReplica):
    """An expert group as pimoe deploys it, that can be called over Serve handles and ZeroMQ too."""

    def __init__(self, config: GroupConfig, links: LinkConfig) -> None:
        super().__init__(config, links)
        self._server.handler = self._answer
        self._zmq = None if without_zmq() else ZmqEcho(config.name)

    def _answer(self, call: Call) -> Reply | Packed:
        if call.method == "echo":
            return Reply(tensors=call.tensors) if call.packed is None else Packed(b"", call.packed.body)
        return self._handler(call)

    async def zmq_address(self) -> str | None:
        """Where ZeroMQ answers."""
        return None if self._zmq is None else self._zmq.address

    async def echo(self, array: NDArray[np.int32]) -> NDArray[np.int32]:
        """What the link's "echo" does, over a handle."""
        return array

    async def forward(self, layer: int, rows: ExpertRows) -> Tensor:
        """What the link's "experts" does, over a handle. Never at the same time as that."""
        return self._handler.group.forward(layer, rows)

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        if getattr(self, "_zmq", None) is not None:
            self._zmq.close()  # type: ignore[union-attr]
        await super().__del__()


class EchoActor:
    """A plain Ray actor."""

    def echo(self, array: NDArray[np.int32]) -> NDArray[np.int32]:
        """What the link's "echo" does."""
        return array


class HandleGroup:
    """A `GroupBackend` as one would write it with plain Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @property
    def computed_s(self) -> float | None:
        """See `GroupBackend`."""
        return None

    @property
    def replicas(self) -> int:
        """See `GroupBackend`."""
        return 1

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        partial: Tensor = await self.handle.forward.remote(layer, rows)
        return partial


class MeasuringRouter:
    """Stands where the router stands: links and ZeroMQ on a loop of their own, handles and actors on the loop that
    Serve gives it.

    Args:
        folder: of the model whose experts are dispatched to.
        groups: the experts of the groups that hold all of them; further handles are of copies.
        whole: whether experts in this process are one group, and not as many as there are apart.
        echoes: whether bytes are sent as well.
    """

    def __init__(
        self,
        folder: str,
        groups: tuple[tuple[int, ...], ...],
        whole: bool,
        echoes: bool,
        links: LinkConfig,
        group_handles: list[Any],
    ) -> None:
        torch.set_num_threads(1)
        checkpoint = Checkpoint(Path(folder))
        self._gate, self._hidden_size, self._dtype = _gate_of(checkpoint)
        self._handles = group_handles
        self._pools = [make_pool(f"group-{i}", handle, links) for i, handle in enumerate(group_handles)]
        without = replace(links, limits=replace(links.limits, shared_memory_bytes=0))
        self._socket_pools = [
            make_pool(f"group-{i}", handle, without) for i, handle in enumerate(group_handles if echoes else [])
        ]
        self._actors = _start_actors(len(group_handles)) if echoes else []
        self._zmq_sockets: list[Any] = []
        self._dispatchers = {
            IN_PROCESS: _local_dispatcher(checkpoint, groups, whole, self._dtype),
            LINK: _dispatcher(groups, [RemoteGroup(pool) for pool in self._pools]),
            LANE: _dispatcher(groups, [RemoteGroup(pool) for pool in self._pools]),
            HANDLE: _dispatcher(groups, [HandleGroup(handle) for handle in group_handles]),
        }
        self._thread = LoopThread("links")
        self._thread.run(self._open_links(), TIMEOUT_S)
        garbage.settle()  # as the router does

    async def _open_links(self) -> None:
        pools = [*self._pools, *self._socket_pools]
        await asyncio.gather(*(pool.start() for pool in pools))
        await asyncio.gather(*(pool.wait_ready(TIMEOUT_S) for pool in pools))

    async def open_zmq(self) -> None:
        """Connect to the groups; before the first echo over ZeroMQ."""
        addresses = [await handle.zmq_address.remote() for handle in self._handles]
        self._zmq_sockets = await asyncio.wrap_future(self._thread.submit(open_dealers(addresses)))

    async def echo(self, way: str, payload_bytes: int, groups: int, calls: int) -> list[float]:
        """Seconds of every call to so many groups at once, until all have answered. Once before that all bytes of
        the answers are compared with what was sent.

        Raises:
            RuntimeError: other bytes came back.
        """
        array = payload(payload_bytes)

        def call(check: Check) -> Awaitable[None]:
            if way in (HANDLE, ACTOR):
                return ray_echo((self._handles if way == HANDLE else self._actors)[:groups], array, check)
            if way == ZMQ:
                return zmq_echo(self._zmq_sockets[:groups], array, check)
            pools = self._socket_pools if way == SOCKET else self._pools
            return (generic_echo if way == GENERIC else link_echo)(pools[:groups], array, check)

        async def measure() -> list[float]:
            await call(same_bytes)
            return await timed(partial(call, same_length), calls)

        return await (measure() if way in (HANDLE, ACTOR) else self._on_links(measure()))

    async def experts(
        self, way: str, tokens: int, calls: int, warm_up: int | None = None, threads: int = 1
    ) -> list[float]:
        """Seconds of every dispatch of so many tokens, from plan to sum; `threads`: torch's, in this process.

        Raises:
            RuntimeError: what was to go over lanes went over links.
        """
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, self._hidden_size, generator=generator).to(self._dtype)
        with torch.inference_mode():
            routing = self._gate(hidden)
        dispatcher = self._dispatchers[way]

        def dispatch() -> Awaitable[Dispatched]:
            return dispatcher.run_counted(LAYER, hidden, routing, time.monotonic() + TIMEOUT_S, lanes=way == LANE)

        torch.set_num_threads(threads)
        try:
            if way == HANDLE:
                return await timed(dispatch, calls, warm_up)
            if way == LANE:
                return await self._on_links(timed_over_lanes(dispatcher, dispatch, calls, warm_up))
            return await self._on_links(timed(dispatch, calls, warm_up))
        finally:
            torch.set_num_threads(1)

    async def _on_links(self, measuring: Coroutine[Any, Any, list[float]]) -> list[float]:
        return await asyncio.wrap_future(self._thread.submit(measuring))

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        if hasattr(self, "_thread"):
            self._thread.run(self._close(), TIMEOUT_S)
            self._thread.close()

    async def _close(self) -> None:
        for socket in self._zmq_sockets:
            socket.close(linger=0)
        await asyncio.gather(*(pool.close() for pool in [*self._pools, *self._socket_pools]))


# Putting it together -------------------------------------------------------------------------------------------


def _gate_of(checkpoint: Checkpoint) -> tuple[Callable[[Tensor], Routing], int, torch.dtype]:
    """The gate of the layer, its hidden size and its dtype."""
    spec = read_spec(checkpoint)
    if isinstance(spec, LayerSpec):
        return load_gate(checkpoint, spec), spec.hidden_size, torch_dtype(spec.dtype)
    trunk = load_trunk(checkpoint.folder)
    return trunk.gates[LAYER], trunk.info.hidden_size, torch_dtype(trunk.info.dtype)


def _dispatcher(groups: Sequence[Sequence[int]], backends: Sequence[GroupBackend]) -> Dispatcher:
    return Dispatcher(Placement(groups), backends[: len(groups)])


def _local_dispatcher(
    checkpoint: Checkpoint, groups: Sequence[Sequence[int]], whole: bool, dtype: torch.dtype
) -> Dispatcher:
    spec = read_spec(checkpoint).experts
    held = [[expert for group in groups for expert in group]] if whole else groups
    return _dispatcher(held, [LocalGroup(ExpertGroup.load(checkpoint, spec, experts, dtype)) for experts in held])


def _start_actors(number: int) -> list[Any]:
    import ray

    kind = ray.remote(num_cpus=0)(EchoActor)
    return [kind.remote() for _ in range(number)]


@contextlib.contextmanager
def deployed(name: str, folder: Path, groups: int, copies: int, whole: bool, echoes: bool) -> Any:
    """A handle of a `MeasuringRouter`, and `copies` groups that hold the experts of `groups` in turn."""
    from ray import serve

    spec = read_spec(Checkpoint(folder))
    placed = contiguous_placement(spec.experts.num_experts, groups).groups
    dtype = str(_gate_of(Checkpoint(folder))[2]).removeprefix("torch.")
    links = LinkConfig(new_secret(), "unix", LinkLimits(), refresh_s=1.0, attempt_timeout_s=TIMEOUT_S)
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}}
    apps = [
        serve.deployment(MeasuredGroup, name=f"{name}-group-{index}", **options).bind(
            GroupConfig(f"group-{index}", str(folder), placed[index % groups], dtype, "cpu", threads=1), links
        )
        for index in range(copies)
    ]
    router = serve.deployment(MeasuringRouter, name=f"{name}-router", **options)
    application = router.bind(str(folder), placed, whole, echoes, links, apps)
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    try:
        yield serve.run(application, name=name, route_prefix=None, logging_config=quiet)
    finally:
        serve.delete(name)
