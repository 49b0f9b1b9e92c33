"""The same dispatch over links and over Ray Serve handles, in one cluster and one run.

    python load_tests/dispatch.py [--preset tiny] [--json FILE]

A replica like the router calls two expert replicas at once and waits for both. Two tables: bytes that come back
as they went, which is transport alone; and tokens through a layer of the embedded model, which is a whole dispatch
with its plan, its experts and its sum. See README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pimoe.deployments.expert_group import ExpertGroupReplica, GroupConfig
from pimoe.deployments.replica import LinkConfig, make_pool
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.experts.client import LocalGroup, RemoteGroup
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.links import Call, LinkLimits, LinkPool, Reply
from pimoe.runtime.links.authentication import new_secret
from pimoe.runtime.loop_thread import LoopThread
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.loading import load_trunk
from pimoe.runtime.routing.dispatch import Dispatcher, GroupBackend
from pimoe.runtime.routing.plan import ExpertRows, Placement, contiguous_placement
from pimoe.runtime.tasks import gather_or_cancel
from pimoe.runtime.tensors import from_wire, to_wire
from report import machine, machine_line, median_quantile, parser, progress, publish, table
from stand import QUIET, stand, supervised
from torch import Tensor

GROUPS = 2
LAYER = 0
ECHO_WAYS = ("link", "handle")
EXPERT_WAYS = ("in-process", "link", "handle")
_NAME = "dispatch"
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all sizes and ways in turn, so that all meet the same disturbances.
        link_calls, handle_calls: per round, size and way; handles are too slow for as many.
        payload_bytes: to each expert replica, and back from it.
        tokens: sizes of a dispatch through real experts.
    """

    rounds: int
    link_calls: int
    handle_calls: int
    payload_bytes: tuple[int, ...] = (2**10, 2**14, 2**17, 2**20)
    tokens: tuple[int, ...] = (1, 8, 32, 128)


PRESETS = {
    "tiny": Preset(rounds=1, link_calls=20, handle_calls=5, tokens=(1, 32)),
    "default": Preset(rounds=5, link_calls=300, handle_calls=40),
}


@dataclass(frozen=True)
class Result:
    """One way of one kind and size of dispatch.

    Attributes:
        kind: "echo", whose size is the bytes to each replica and back, or "experts", whose size is tokens.
        p50_us, p95_us: until both replicas have answered; medians over rounds of each round's quantile.
        ratio: p50 to that of the link.
    """

    kind: str
    size: int
    way: str
    p50_us: float
    p95_us: float
    ratio: float


# What runs in the cluster --------------------------------------------------------------------------------------


class MeasuredGroup(ExpertGroupReplica):
    """An expert group as pimoe deploys it, that Serve handles can call too."""

    def __init__(self, config: GroupConfig, links: LinkConfig) -> None:
        super().__init__(config, links)
        self._server.handler = self._answer

    def _answer(self, call: Call) -> Reply:
        return Reply({}, call.tensors) if call.method == "echo" else self._handler(call)

    async def echo(self, array: NDArray[np.int32]) -> NDArray[np.int32]:
        """What the link's "echo" does, over a handle."""
        return array

    async def forward(self, layer: int, rows: ExpertRows) -> Tensor:
        """What the link's "experts" does, over a handle. Never at the same time as that."""
        return self._handler.group.forward(layer, rows)


class HandleGroup:
    """A `GroupBackend` as one would write it with plain Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @property
    def computed_s(self) -> float | None:
        return None

    @property
    def replicas(self) -> int:
        return 1

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        partial: Tensor = await self.handle.forward.remote(layer, rows)
        return partial


class MeasuringRouter:
    """Stands where the router stands: links on a loop of their own, handles on the loop that Serve gives it."""

    def __init__(self, groups: tuple[tuple[int, ...], ...], links: LinkConfig, group_handles: list[Any]) -> None:
        torch.set_num_threads(1)
        trunk, checkpoint, placement = load_trunk(CHECKPOINT), Checkpoint(CHECKPOINT), Placement(groups)
        self._gate, self._hidden_size = trunk.gates[LAYER], trunk.info.hidden_size
        self._handles = group_handles
        self._pools = [make_pool(f"group-{i}", handle, links) for i, handle in enumerate(group_handles)]
        spec = read_spec(checkpoint).experts
        local = [LocalGroup(ExpertGroup.load(checkpoint, spec, experts, torch.float32)) for experts in groups]
        backends: dict[str, Sequence[GroupBackend]] = {
            "in-process": local,
            "link": [RemoteGroup(pool) for pool in self._pools],
            "handle": [HandleGroup(handle) for handle in group_handles],
        }
        self._dispatchers = {way: Dispatcher(placement, groups) for way, groups in backends.items()}
        self._thread = LoopThread("links")
        self._thread.run(self._open(), _TIMEOUT_S)

    async def _open(self) -> None:
        await asyncio.gather(*(pool.start() for pool in self._pools))
        await asyncio.gather(*(pool.wait_ready(_TIMEOUT_S) for pool in self._pools))

    async def echo(self, way: str, payload_bytes: int, calls: int) -> list[float]:
        """Seconds of every call."""
        tensor = torch.zeros(payload_bytes, dtype=torch.uint8).view(torch.int32)
        if way == "handle":
            # numpy's arrays cross Ray without the copies that torch's tensors take.
            array = tensor.numpy()
            return await _times(lambda: gather_or_cancel([_handle_echo(h, array) for h in self._handles]), calls)
        return await self._on_links(lambda: gather_or_cancel([_link_echo(p, tensor) for p in self._pools]), calls)

    async def experts(self, way: str, tokens: int, calls: int) -> list[float]:
        """Seconds of every dispatch."""
        hidden = torch.randn(tokens, self._hidden_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            routing = self._gate(hidden)
        dispatcher = self._dispatchers[way]

        def dispatch() -> Awaitable[Tensor]:
            return dispatcher.run(LAYER, hidden, routing, time.monotonic() + _TIMEOUT_S)

        return await (_times(dispatch, calls) if way == "handle" else self._on_links(dispatch, calls))

    async def _on_links(self, call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
        return await asyncio.wrap_future(self._thread.submit(_times(call, calls)))

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        if hasattr(self, "_thread"):
            self._thread.run(self._close(), _TIMEOUT_S)
            self._thread.close()

    async def _close(self) -> None:
        await asyncio.gather(*(pool.close() for pool in self._pools))


async def _link_echo(pool: LinkPool, tensor: Tensor) -> Tensor:
    reply = await pool.call("echo", {}, [to_wire(tensor)], time.monotonic() + _TIMEOUT_S)
    answer = from_wire(reply.tensors[0])
    if answer.nbytes != tensor.nbytes:
        raise RuntimeError(f"{answer.nbytes} bytes came back of {tensor.nbytes}")
    return answer


async def _handle_echo(handle: Any, array: NDArray[np.int32]) -> NDArray[np.int32]:
    answer: NDArray[np.int32] = await handle.echo.remote(array)
    if answer.nbytes != array.nbytes:
        raise RuntimeError(f"{answer.nbytes} bytes came back of {array.nbytes}")
    return answer


async def _times(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    for _ in range(max(2, calls // 10)):  # warm-up
        await call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        await call()
        times.append(time.perf_counter() - started)
    return times


# The measurement -----------------------------------------------------------------------------------------------


def measure(preset: Preset) -> list[Result]:
    """Deploy the measuring application beside whatever runs in this process' cluster, measure, and remove it."""
    from ray import serve

    progress("dispatch: starting two expert groups and a router that measures")
    router = serve.run(_application(), name=_NAME, route_prefix=None, logging_config=QUIET)
    try:
        cases = [
            *(("echo", size, way) for size in preset.payload_bytes for way in ECHO_WAYS),
            *(("experts", size, way) for size in preset.tokens for way in EXPERT_WAYS),
        ]
        times: dict[tuple[str, int, str], list[list[float]]] = {case: [] for case in cases}
        for index in range(preset.rounds):
            progress(f"dispatch: round {index + 1} of {preset.rounds}")
            for kind, size, way in cases:
                calls = preset.handle_calls if way == "handle" else preset.link_calls
                answer = getattr(router, kind).remote(way, size, calls)
                times[kind, size, way].append(answer.result(timeout_s=_TIMEOUT_S))
    finally:
        serve.delete(_NAME)
    return [_result(case, rounds, times[case[0], case[1], "link"]) for case, rounds in times.items()]


def _application() -> Any:
    from ray import serve

    spec = read_spec(Checkpoint(CHECKPOINT))
    groups = contiguous_placement(spec.experts.num_experts, GROUPS).groups
    links = LinkConfig(new_secret(), "unix", LinkLimits(), refresh_s=1.0, attempt_timeout_s=_TIMEOUT_S)
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}}
    apps = [
        serve.deployment(MeasuredGroup, name=f"measured-group-{index}", **options).bind(
            GroupConfig(f"group-{index}", str(CHECKPOINT), experts, "float32", "cpu", threads=1), links
        )
        for index, experts in enumerate(groups)
    ]
    return serve.deployment(MeasuringRouter, name="measuring-router", **options).bind(groups, links, apps)


def _result(case: tuple[str, int, str], rounds: list[list[float]], link_rounds: list[list[float]]) -> Result:
    p50, p95, link = (median_quantile(r, q) for r, q in ((rounds, 0.5), (rounds, 0.95), (link_rounds, 0.5)))
    return Result(*case, p50_us=1e6 * p50, p95_us=1e6 * p95, ratio=p50 / link)


def tables(results: Sequence[Result]) -> str:
    """For people."""
    titles = {
        "echo": f"Dispatch to {GROUPS} replicas at once, as many bytes back (medians of rounds)",
        "experts": f"Dispatch of tokens through {GROUPS} expert groups of the embedded model, from plan to sum",
    }
    sizes = {"echo": "bytes each", "experts": "tokens"}
    return "\n\n".join(
        table(
            title,
            (sizes[kind], "way", "p50 us", "p95 us", "to link"),
            [
                (f"{r.size:,}", r.way, f"{r.p50_us:,.0f}", f"{r.p95_us:,.0f}", f"{r.ratio:.2f}x")
                for r in results
                if r.kind == kind
            ],
        )
        for kind, title in titles.items()
    )


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    here = machine()
    with stand() as cluster:
        cluster.serve(None, GROUPS)
        results = measure(PRESETS[options.preset])
    facts = {"machine": here, "preset": options.preset, "dispatch": [asdict(result) for result in results]}
    publish(facts, f"{machine_line(here)}\n\n{tables(results)}", options.json)


if __name__ == "__main__":
    command_line = parser("Compare dispatch over pimoe's links and over Ray Serve handles.", PRESETS)
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
