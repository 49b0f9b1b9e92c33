"""Handlers that do nothing, behind the same HAProxy as the gateway: what a cached answer is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cache_requests import Asked, post
from report import progress
from stand import QUIET
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

_SAME_THREAD = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # as in deployments/app.py: it is faster so
_PAST_SERVE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares"}  # as deployments/direct.py
_READY_TIMEOUT_S = 30.0

_direct: dict[str, ASGIApp] = {}  # by prefix of the path


class EmptyHandler:
    """A Starlette application with routes that answer constants, as the gateway's replica has its own.

    Args:
        answers: body and content type, by the name that comes after the prefix in the path.
        past_serve: the prefix of what is answered without Serve's own handling, as the gateway's requests are.
    """

    def __init__(self, answers: dict[str, tuple[bytes, str]], past_serve: str | None) -> None:
        self._answers, self._past_serve = answers, past_serve

    def __serve_build_asgi_app__(self) -> Any:
        app = Starlette(routes=[_route(name, *answer) for name, answer in self._answers.items()])
        if self._past_serve is not None:
            _direct[self._past_serve] = app
        return app


def _route(name: str, body: bytes, content_type: str) -> Route:
    async def answer(request: Request) -> Response:
        return Response(body, media_type=content_type)

    return Route(f"/{name}", answer, methods=["POST"])


def middlewares() -> list[Middleware]:
    """Called by Serve when it starts a replica's HTTP server."""
    return [Middleware(PastServe)]


class PastServe:
    """ASGI middleware in front of all that Serve does; Serve keeps all but the handler's own paths."""

    def __init__(self, app: ASGIApp) -> None:
        self._serve = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer it, or leave it to Serve."""
        prefix, _, name = scope.get("path", "").rpartition("/")
        if (app := _direct.get(prefix)) is None:
            await self._serve(scope, receive, send)
        else:
            await app({**scope, "path": f"/{name}", "root_path": ""}, receive, send)


def start_empty(url: str, asked: Sequence[Asked], replicas: int, name: str, past_serve: bool) -> str:
    """Where it answers. As many replicas as the gateway, with the options that make the gateway fast.

    Raises:
        RuntimeError: it does not answer what it is to.
    """
    from ray import serve

    progress(f"cache: starting an empty handler behind the same HAProxy{', past Serve' if past_serve else ''}")
    flags = {**_SAME_THREAD, **(_PAST_SERVE if past_serve else {})}
    options: dict[str, Any] = {
        "num_replicas": replicas,
        "max_ongoing_requests": 100_000,
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": flags}},
    }
    answers = {one.name: (one.answer, one.content_type) for one in asked}
    handler = serve.deployment(serve.ingress()(EmptyHandler), name=name, **options)
    application = handler.bind(answers, f"/{name}" if past_serve else None)
    serve.run(application, name=name, route_prefix=f"/{name}", logging_config=QUIET)
    for one in asked:
        _await_answer(one, f"{url}/{name}/{one.name}")
    return f"{url}/{name}"


def stop_empty(name: str) -> None:
    """Take it down; it may be down."""
    from ray import serve

    serve.delete(name)


def _await_answer(one: Asked, url: str) -> None:
    until = time.monotonic() + _READY_TIMEOUT_S
    while (found := post(one.elsewhere(url)))[2] != one.answer:
        if time.monotonic() > until:
            raise RuntimeError(f"the empty handler answers {found[0]}: {found[2][:300]!r}")
        time.sleep(0.2)
