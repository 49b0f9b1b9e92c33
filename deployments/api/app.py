"""The Starlette application: which path has which handler. Nothing of Ray Serve; `deployments/gateway.py`
wraps it."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ...runtime.errors import PimoeError
from . import admin, errors, inference, openai, openai_tokenize
from .call import Endpoint, Handler, is_openai, request_id_of
from .context import GatewayContext
from .errors import NotFoundError

# Starlette tries routes in order: the busiest come first, and the catch-all of model metadata last.
POST_ROUTES: tuple[tuple[str, Handler], ...] = (
    ("/v2/models/{name:path}/infer", inference.infer),
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


def create_app(context: GatewayContext) -> Starlette:
    """The application that serves `context` over HTTP."""
    routes: list[BaseRoute] = []
    for table, methods in ((POST_ROUTES, ("POST",)), (GET_ROUTES, ("GET", "HEAD"))):
        routes.extend(Route(path, Endpoint(context, handler, methods)) for path, handler in table)
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
