"""The way around Serve's own handling of each request, in the gateway's replica.

In HAProxy mode a replica runs an HTTP server of its own. In front of the application Serve keeps for each request
a context, two tasks, headers and ids of its own and a second set of metrics: more processor time than a cache hit
takes. `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names middlewares that come before that; `middlewares` here is
such a callback, set for the gateway's replicas alone. What the gateway knows goes straight to it. Serve keeps its
own paths (`/-/healthz`), all others, and the gateways that are mounted below a prefix.

What Serve did for those requests the gateway does itself: deadlines, disconnects, ids, metrics. On shutdown
uvicorn waits for requests under way, as Serve would. What is lost: they are in no `ray_serve_*` metric, and
Serve's own autoscaling does not count them; so a gateway that scales by itself is served the long way.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from .api.app import GatewayApp
from .metrics import GatewayMetrics

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares"}

_served: list[tuple[GatewayApp, GatewayMetrics]] = []


def serve_directly(app: GatewayApp, metrics: GatewayMetrics) -> None:
    """From now on this process answers what `app` knows directly, counted in `metrics`; it has one gateway."""
    _served[:] = [(app, metrics)]


def middlewares() -> list[Middleware]:
    """Called by Serve when it starts a replica's HTTP server."""
    return [Middleware(DirectIngress)]


class DirectIngress:
    """ASGI middleware in front of all that Serve does."""

    def __init__(self, app: ASGIApp) -> None:
        self._serve = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer it, or leave it to Serve."""
        if _served:
            app, metrics = _served[0]
            if (endpoint := app.find(scope)) is not None:
                await metrics.run(endpoint, scope, receive, send)
                return
        await self._serve(scope, receive, send)
