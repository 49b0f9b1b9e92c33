"""The deployment of the gateway: HTTP in, the result cache, links to the routers. The application's ingress."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime import garbage
from ..runtime.caching import (
    BypassReason,
    CachedBackend,
    CachedStatistics,
    CacheLimits,
    Prefetcher,
    PrefetchLimits,
    RedisLevel,
    RedisLimits,
    ResultCache,
    Serving,
)
from ..runtime.errors import UnavailableError
from ..runtime.generation.stopping import StoppingBackend
from ..runtime.model.tokenizer import Tokenizer
from ..runtime.requests import GenerateAnswer, GenerateRequest, InferAnswer, InferRequest, ModelInfo
from ..runtime.router.client import RouterClient
from .api.app import create_app
from .api.context import ApiSettings
from .api.known_answers import MAX_BYTES, KnownAnswers
from .api.prompt_cache import ChatPrompts, PromptCache, PromptCacheLimits
from .direct import serve_directly
from .metrics import GatewayMetrics
from .metrics_page import render
from .replica import LinkConfig, LiveSettings, describe_all, identity, make_pool
from .settings import CacheSettings
from .totals import add_up

_log = logging.getLogger(__name__)

_FIRST_LINK_S = 5.0
_PAGE_TIMEOUT_S = 2.0  # well below the time that Prometheus gives a scrape
_FLUSH_ATTEMPTS = 4
_FLUSH_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What a gateway's replica is told; plain values."""

    folder: str
    groups: tuple[tuple[str, tuple[int, ...]], ...]  # name and experts of each
    api: ApiSettings
    cache: CacheLimits
    live: Mapping[str, Any]  # see `LiveSettings`
    second_level: RedisLimits | None = None
    share_tenants: bool = False
    prefetch: PrefetchLimits = field(default_factory=PrefetchLimits)
    prompt_cache: PromptCacheLimits = field(default_factory=PromptCacheLimits)
    batch_invariant: bool = False
    expert_quantization: str | None = None


class GatewayReplica:
    """One replica of the gateway; implements `GatewayContext` for the routes."""

    def __init__(
        self, config: GatewayConfig, links: LinkConfig, router_handle: Any, group_handles: dict[str, Any]
    ) -> None:
        self.settings = config.api
        self.created_s = int(time.time())
        self.tokenizer = Tokenizer.load(Path(config.folder))
        self.prompts = None if self.tokenizer is None else _prompts(self.tokenizer, config.prompt_cache)
        self._router_handle = router_handle
        self._group_handles = group_handles
        self._groups = config.groups
        self._last_seen: dict[str, list[dict[str, Any]]] = {}
        self._pool = make_pool("router", router_handle, links)
        self._second = None if config.second_level is None else RedisLevel(config.second_level)
        self._cache = CachedBackend(
            StoppingBackend(RouterClient(self._pool), self.tokenizer),
            ResultCache(config.cache),
            self._second,
            Serving(
                _tokenizer_digest(Path(config.folder)),
                tuple(experts for _, experts in config.groups),
                config.batch_invariant,
                config.expert_quantization,
            ),
            config.share_tenants,
        )
        self._prefetcher = Prefetcher(
            config.prefetch, self._cache.warm, self._cache.is_idle, self._cache.cache.__contains__
        )
        self._cache.watcher = self._prefetcher
        self.known = _known_answers(config.cache)
        self._metrics = GatewayMetrics()
        self._live = LiveSettings(config.live)
        self._joined = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor."""
        app = create_app(self)
        serve_directly(app, self._metrics)
        return _leave_request_id_to_serve(self._metrics.observe(app))

    @property
    def model(self) -> ModelInfo:
        """See `GatewayContext`."""
        return self._cache.model

    async def infer(self, request: InferRequest, bypass: BypassReason | None) -> InferAnswer:
        """See `GatewayContext`."""
        return await self._cache.infer(request, bypass)

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None) -> GenerateAnswer:
        """See `GatewayContext`."""
        return await self._cache.generate(request, bypass)

    def recall(self, hits: Sequence[object]) -> bool:
        """See `GatewayContext`."""
        return self._cache.recall(hits)

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
            "cache": add_up([gateway["cache"] for gateway in gateways]),
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

    async def flush_cache(self, model: str | None, tenant: str | None) -> dict[str, Any]:
        """See `GatewayContext`. The second level comes first: a gateway that was flushed must find nothing old
        there to fill itself with."""
        missed = None
        second_level: dict[str, int] | None = None
        if self._second is not None:
            try:
                second_level = {"deleted": await self._second.flush(model, tenant)}
            except UnavailableError as error:
                missed = error
        flushed = await self._flush_gateways(model, tenant)
        if missed is not None:
            raise UnavailableError(f"the gateways are flushed, but {missed.message}; ask again", None, 1.0)
        return {"flushed": sum(flushed), "gateways": len(flushed), "second_level": second_level}

    async def _flush_gateways(self, model: str | None, tenant: str | None) -> list[int]:
        """How many answers each gateway forgot; this one's are counted with the first."""
        own = self.flush_memory(model, tenant)
        for _ in range(_FLUSH_ATTEMPTS):
            try:
                response = _own_handle().broadcast("flush_memory", model, tenant)
                first, *others = await asyncio.to_thread(response.results, timeout_s=_PAGE_TIMEOUT_S)
            except Exception as error:  # all answer or none: one is dying, or hangs
                _log.info("a flush did not reach every gateway: %s", error)
                await asyncio.sleep(_FLUSH_PAUSE_S)
            else:
                return [own + first, *others]
        raise UnavailableError("not every gateway answered the flush; ask again", None, _FLUSH_PAUSE_S)

    def flush_memory(self, model: str | None, tenant: str | None) -> int:
        """This gateway's part of a flush; called by broadcast."""
        self.known.clear()
        return self._cache.flush(model, tenant)

    async def metrics(self) -> tuple[bytes, str]:
        """See `GatewayContext`."""
        return render(await self.status())

    def describe(self) -> dict[str, Any]:
        """For the status page; called by broadcast."""
        return {
            **identity([]),
            "cache": {
                **_plain(self._cache.statistics()),
                "prefetch": self._prefetcher.statistics()._asdict(),
            },
            "routers": self._pool.statistics()._asdict(),
            "prompts": None if self.prompts is None else self.prompts.statistics()._asdict(),
            "requests": self._metrics.snapshot(),
            "refused_settings": self._live.refused,
        }

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Live settings: `cache`, as in the application's settings, but for its second level and tenants; see
        `LiveSettings`. Also the moment to start the links: Serve calls it once after the constructor, on the loop
        that requests run on. That time it waits a while for a router: a gateway that joins must refuse nothing."""
        self._live.take(user_config, self._change)
        await self._pool.start()
        if not self._joined:
            with contextlib.suppress(UnavailableError):  # then every answer says so
                await self._pool.wait_ready(_FIRST_LINK_S)
            self._joined = True
        self._prefetcher.start()
        garbage.settle()

    def _change(self, user_config: Mapping[str, Any]) -> None:
        if "cache" in user_config:
            settings = CacheSettings.model_validate(user_config["cache"])
            limits, prefetch = settings.to_limits(), settings.to_prefetch()
            self._cache.cache.limits = limits
            self.known = _known_answers(limits)
            if prefetch != self._prefetcher.limits:
                self._prefetcher.limits = prefetch

    async def __del__(self) -> None:
        """Called by Serve when the replica is drained and stops."""
        if hasattr(self, "_prefetcher"):
            await self._prefetcher.close()
        if hasattr(self, "_pool"):
            await self._pool.close()
        if hasattr(self, "_second") and self._second is not None:
            await self._second.close()


def _plain(statistics: CachedStatistics) -> dict[str, Any]:
    """The first level's numbers by themselves, and with them what concerns both."""
    second = statistics.second
    return {
        **statistics.memory._asdict(),
        "outcomes": statistics.outcomes,
        "bypass_reasons": statistics.bypass_reasons,
        "superseded": statistics.superseded,
        "second": None if second is None else second._asdict(),
    }


def _known_answers(limits: CacheLimits) -> KnownAnswers:
    """Beside a small cache there is no more of them than of it."""
    return KnownAnswers(min(MAX_BYTES, limits.max_bytes))


def _prompts(tokenizer: Tokenizer, limits: PromptCacheLimits) -> ChatPrompts:
    return ChatPrompts(tokenizer, PromptCache(limits), tokenizer.chat_reads_clock)


def _tokenizer_digest(folder: Path) -> str:
    """Of the files that decide what a prompt's text means."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        file = folder / name
        content = file.read_bytes() if file.exists() else b""
        digest.update(f"{name} {file.exists()} {len(content)} ".encode() + content)
    return digest.hexdigest()


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


def _sum_queues(routers: list[dict[str, Any]]) -> dict[str, Any]:
    queues = []
    for router in routers:
        statistics = router["statistics"]
        queues.append(statistics["batcher"]["queue"])
        if statistics["engine"] is not None:
            queues.append(statistics["engine"]["queue"])
    return add_up(queues)
