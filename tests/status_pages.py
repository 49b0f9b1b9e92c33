"""Pages of `/admin/status` made by hand from the runtime's own statistics, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from cache_backend import Backend
from fake_gateway import MODEL, ByteCodec
from fake_second_level import FakeSecondLevel
from pimoe.deployments.api.prompt_cache import ChatPrompts
from pimoe.deployments.gateway import _plain, _sum_queues
from pimoe.deployments.metrics import GatewayMetrics
from pimoe.deployments.totals import add_up
from pimoe.runtime.batching import QueueLimits
from pimoe.runtime.batching.batcher import BatcherStatistics
from pimoe.runtime.batching.latency import LatencyModel
from pimoe.runtime.batching.queue import PriorityQueue
from pimoe.runtime.caching import CachedBackend, CacheLimits, PrefetchLimits, ResultCache
from pimoe.runtime.caching.prefetch import Prefetcher
from pimoe.runtime.generation.block_pool import BlockPool
from pimoe.runtime.generation.engine_statistics import EngineStatistics
from pimoe.runtime.generation.micro_batches import MicroBatchModel
from pimoe.runtime.histogram import TOKENS, Histogram
from pimoe.runtime.requests import ModelInfo
from pimoe.runtime.routing.dispatch import DispatchStatistics

GROUPS = (("group-0", [0, 1]), ("group-1", [2, 3]))


def queue(**classes: dict[str, Any]) -> dict[str, Any]:
    """A queue's statistics: fields of its classes as given, `waits` as a list of seconds."""
    books: Any = PriorityQueue(QueueLimits())
    page: dict[str, Any] = books.statistics()._asdict()
    for name, fields in classes.items():
        waits = Histogram()
        for seconds in fields.get("waits", ()):
            waits.add(seconds)
        page["classes"][name].update({**fields, "waits": waits.snapshot()})
        for field in fields.keys() - {"waits"}:
            page[field] += fields[field]
    return page


def batcher(tensors: dict[str, Any] | None = None, sizes: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
    """A batcher's statistics."""
    tokens = Histogram(TOKENS)
    for size in sizes:
        tokens.add(size)
    plain = BatcherStatistics(
        queue=PriorityQueue[Any](QueueLimits()).statistics(),
        in_flight=0,
        batches=len(sizes),
        tokens=sum(sizes),
        closed={},
        sizes=tokens.snapshot(),
        latency=LatencyModel().snapshot(),
        max_batch_tokens=4096,
        utilisation=0.0,
    ).as_plain()
    return {**plain, "queue": tensors or queue(), **fields}


def engine(generation: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """An engine's statistics."""
    empty = PriorityQueue[Any](QueueLimits()).statistics()
    times = Histogram().snapshot()
    plain = EngineStatistics(
        queue=empty,
        running=0,
        preempted=0,
        kv_bytes=0,
        kv_blocks=BlockPool(8, 16).statistics(),
        preemptions=0,
        steps=0,
        prefill_tokens=0,
        decode_tokens=0,
        step_s=0.0,
        first_token_s=times,
        between_tokens_s=times,
        micro_batches=MicroBatchModel().statistics(),
        latency=LatencyModel().snapshot(),
    ).as_plain()
    return {**plain, "queue": generation or queue(), **fields}


def router(name: str = "a1b2c3d4", per_expert: bool = False, **parts: Any) -> dict[str, Any]:
    """A router's replica; `batcher`, `engine` (None: a layer model) and `state` as given."""
    dispatch = DispatchStatistics(3, 1, (40, 2), (20, 20, 1, 1), 0.5).as_plain(per_expert)
    return {
        "id": name,
        "deployment": "router",
        "pid": 4_194_304,
        "state": parts.get("state", "running"),
        "weights_bytes": 123_456_789,
        "model": _model(parts.get("engine", {})).to_wire(),
        "groups": [{"name": group, "replicas": 1} for group, _ in GROUPS],
        "statistics": {
            "batcher": parts.get("batcher") or batcher(),
            "engine": parts["engine"] if "engine" in parts else engine(),
            "dispatch": dispatch,
        },
    }


def _model(engine_statistics: Any) -> ModelInfo:
    return MODEL if engine_statistics is not None else ModelInfo(**{**MODEL.to_wire(), "kind": "layer"})


def gateway(
    name: str = "e5f6a7b8", second: bool = False, requests: tuple[tuple[str, int, int], ...] = ()
) -> dict[str, Any]:
    """A gateway's replica."""
    cache: Any = ResultCache(CacheLimits())
    backend = CachedBackend(Backend(), cache, FakeSecondLevel() if second else None)
    prefetcher = Prefetcher(PrefetchLimits(), backend.warm, backend.is_idle, cache.__contains__)
    counts = GatewayMetrics().snapshot()
    waits = Histogram()
    waits.add(0.02)
    histograms = {route: waits.snapshot() for route, _, _ in requests}
    return {
        "id": name,
        "deployment": "gateway",
        "pid": 4_194_303,
        "state": "running",
        "cache": {**_plain(backend.statistics()), "prefetch": prefetcher.statistics()._asdict()},
        "prompts": ChatPrompts(ByteCodec()).statistics()._asdict(),
        "requests": {
            **counts,
            "statuses": [list(entry) for entry in requests],
            "durations": histograms,
            "first_bytes": histograms,
        },
    }


def group_replica(name: str) -> dict[str, Any]:
    """A replica of an expert group."""
    statistics = {"batches": 3, "rows": 42, "pairs": 84, "busy_s": 1.5}
    return {
        "id": name,
        "deployment": "group",
        "pid": 77,
        "state": "running",
        "weights_bytes": 1_000,
        "statistics": statistics,
    }


def page(routers: list[dict[str, Any]], gateways: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The whole page, put together as a gateway does it."""
    gateways = [gateway()] if gateways is None else gateways
    return {
        "model": routers[0]["model"] if routers else None,
        "groups": [
            {"name": name, "experts": experts, "replicas": [group_replica(f"{name}-r")]}
            for name, experts in GROUPS
        ],
        "routers": routers,
        "gateways": gateways,
        "queue": _sum_queues(routers),
        "cache": add_up([each["cache"] for each in gateways]),
    }
