"""The deployment of the gateway: HTTP in, the result cache, links to the routers. The application's ingress."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.caching import CachedBackend, CacheLimits, ResultCache
from ..runtime.model.tokenizer import Tokenizer
from ..runtime.requests import GenerateAnswer, GenerateRequest, InferAnswer, InferRequest, ModelInfo
from ..runtime.router.client import RouterClient
from .api.app import create_app
from .api.context import ApiSettings
from .metrics import GatewayMetrics, render
from .replica import LinkConfig, describe_all, identity, make_pool
from .settings import CacheSettings

_log = logging.getLogger(__name__)

_PAGE_TIMEOUT_S = 2.0  # well below the time that Prometheus gives a scrape


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What a gateway's replica is told; plain values."""

    folder: str
    groups: tuple[tuple[str, tuple[int, ...]], ...]  # name and experts of each
    api: ApiSettings
    cache: CacheLimits


class GatewayReplica:
    """One replica of the gateway; implements `GatewayContext` for the routes."""

    def __init__(
        self, config: GatewayConfig, links: LinkConfig, router_handle: Any, group_handles: dict[str, Any]
    ) -> None:
        self.settings = config.api
        self.created_s = int(time.time())
        self.tokenizer = Tokenizer.load(Path(config.folder))
        self._router_handle = router_handle
        self._group_handles = group_handles
        self._groups = config.groups
        self._last_seen: dict[str, list[dict[str, Any]]] = {}
        self._pool = make_pool("router", router_handle, links)
        self._cache = CachedBackend(RouterClient(self._pool), ResultCache(config.cache))
        self._metrics = GatewayMetrics()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor."""
        return _leave_request_id_to_serve(self._metrics.observe(create_app(self)))

    @property
    def model(self) -> ModelInfo:
        """See `GatewayContext`."""
        return self._cache.model

    async def infer(self, request: InferRequest, use_cache: bool) -> InferAnswer:
        """See `GatewayContext`."""
        return await self._cache.infer(request, use_cache)

    async def generate(self, request: GenerateRequest, use_cache: bool) -> GenerateAnswer:
        """See `GatewayContext`."""
        return await self._cache.generate(request, use_cache)

    async def ready(self) -> bool:
        """Whether a router is linked that has links to every group; as of the last discovery, about a second."""
        return any(
            all(group["replicas"] > 0 for group in link.endpoint.info["groups"])
            for link in self._pool.links.values()
        )

    async def status(self) -> dict[str, Any]:
        """See `GatewayContext`."""
        handles = {"router": self._router_handle, "gateway": _own_handle(), **self._group_handles}
        pages = await asyncio.gather(*(self._describe(name, handle) for name, handle in handles.items()))
        routers, gateways, *groups = pages
        return {
            "model": routers[0]["model"] if routers else None,
            "groups": [
                {"name": name, "experts": list(experts), "replicas": replicas}
                for (name, experts), replicas in zip(self._groups, groups, strict=True)
            ],
            "routers": routers,
            "gateways": gateways,
            "queue": _sum_queues(routers),
            "cache": _sum([gateway["cache"] for gateway in gateways]),
        }

    async def _describe(self, name: str, handle: Any) -> list[dict[str, Any]]:
        """A deployment's replicas. Serve's broadcast answers for all or for none: while one hangs, or has just
        died, the page shows what was last known, and says so."""
        try:
            self._last_seen[name] = await describe_all(handle, _PAGE_TIMEOUT_S)
        except Exception as error:  # Ray raises many kinds in the instants after a death
            _log.info("%s does not answer: %s", name, error)
            return [{**replica, "state": "unknown"} for replica in self._last_seen.get(name, [])]
        return self._last_seen[name]

    async def metrics(self) -> tuple[bytes, str]:
        """See `GatewayContext`."""
        return render(await self.status())

    def describe(self) -> dict[str, Any]:
        """For the status page; called by broadcast."""
        return {
            **identity([]),
            "cache": self._cache.cache.statistics()._asdict(),
            "routers": self._pool.statistics()._asdict(),
            "requests": self._metrics.snapshot(),
        }

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Live settings: `cache`, as in the application's settings. Also the moment to start the links: Serve
        calls it once after the constructor, on the loop that requests run on."""
        if "cache" in user_config:
            self._cache.cache.limits = CacheSettings(**user_config["cache"]).to_limits()
        await self._pool.start()

    async def __del__(self) -> None:
        """Called by Serve when the replica is drained and stops."""
        if hasattr(self, "_pool"):
            await self._pool.close()


def _own_handle() -> Any:
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


def _leave_request_id_to_serve(app: ASGIApp) -> ASGIApp:
    """Serve adds `x-request-id` to every answer; twice would be once too often."""

    async def without(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await app(scope, receive, send_without)

    return without


def _sum(parts: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _sum_queues(routers: list[dict[str, Any]]) -> dict[str, Any]:
    queues = []
    for router in routers:
        statistics = router["statistics"]
        queues.append(statistics["batcher"]["queue"])
        if statistics["engine"] is not None:
            queues.append(statistics["engine"]["queue"])
    return _sum(queues)
