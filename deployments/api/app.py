"""The ASGI application: which path has which handler. Nothing of Ray Serve; `deployments/gateway.py` wraps it."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...runtime.errors import PimoeError
from . import admin, errors, inference, openai, openai_tokenize
from .call import Endpoint, Handler, is_openai, request_id_of
from .context import GatewayContext
from .errors import NotFoundError

INFER_PATH = "/v2/models/{name:path}/infer"

# Starlette tries routes in order: the catch-all of model metadata comes last.
POST_ROUTES: tuple[tuple[str, Handler], ...] = (
    (INFER_PATH, inference.infer),
    ("/v1/completions", openai.completions),
    ("/v1/chat/completions", openai.chat_completions),
    ("/v2/models/{name:path}/infer_many", inference.infer_many),
    ("/admin/cache/flush", admin.flush_cache),
    ("/tokenize", openai_tokenize.tokenize),
    ("/detokenize", openai_tokenize.detokenize),
)
GET_ROUTES: tuple[tuple[str, Handler], ...] = (
    ("/health", admin.health),
    ("/metrics", admin.metrics),
    ("/admin/status", admin.status),
    ("/v1/models", openai.models),
    ("/v1/models/{name:path}", openai.model),
    ("/v2", inference.server_metadata),
    ("/v2/health/live", inference.server_live),
    ("/v2/health/ready", inference.server_ready),
    ("/v2/models/{name:path}/ready", inference.model_ready),
    ("/v2/models/{name:path}", inference.model_metadata),
)

_INFER_START, _, _INFER_END = INFER_PATH.partition("{name:path}")


class GatewayApp:
    """The application that serves `context` over HTTP.

    Paths without parameters, and that of tensors, are looked up; Starlette has all others, and what is mounted
    below a prefix. Trying its patterns one after the other, between its middlewares, costs as much as a cache hit.
    """

    def __init__(self, context: GatewayContext) -> None:
        endpoints = {
            path: Endpoint(context, handler, methods)
            for table, methods in ((POST_ROUTES, ("POST",)), (GET_ROUTES, ("GET", "HEAD")))
            for path, handler in table
        }
        self._infer = endpoints[INFER_PATH]
        self._fixed = {path: endpoint for path, endpoint in endpoints.items() if "{" not in path}
        self._starlette: ASGIApp = _starlette(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.find(scope) or self._starlette)(scope, receive, send)

    def find(self, scope: Scope) -> Endpoint | None:
        """The endpoint of a path that needs no pattern to be found."""
        if scope["type"] != "http" or scope.get("root_path"):
            return None
        path: str = scope["path"]
        if (endpoint := self._fixed.get(path)) is not None:
            return endpoint
        if not (path.startswith(_INFER_START) and path.endswith(_INFER_END)):
            return None
        if "\n" in path or len(path) <= len(_INFER_START) + len(_INFER_END):
            return None
        scope["path_params"] = {"name": path[len(_INFER_START) : -len(_INFER_END)]}
        return self._infer


def create_app(context: GatewayContext) -> GatewayApp:
    """The application that serves `context` over HTTP."""
    return GatewayApp(context)


def _starlette(endpoints: dict[str, Endpoint]) -> Starlette:
    routes: list[BaseRoute] = [Route(path, endpoint) for path, endpoint in endpoints.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    # A redirect would make clients drop the body of a POST; a wrong path is an error.
    app.router.redirect_slashes = False
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    missing: PimoeError = NotFoundError(f"no route {request.method} {request.url.path[:200]}")
    status, body, content_type, extra = errors.render(missing, is_openai(request.scope))
    response = Response(body, status, media_type=content_type.decode())
    response.raw_headers.extend(extra)
    request_id = request_id_of(dict(request.scope["headers"]))
    response.headers["x-request-id"] = request_id
    return response
