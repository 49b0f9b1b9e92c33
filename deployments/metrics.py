"""What a gateway counts of its own requests. `metrics_page.py` turns it, and all else, into the page."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.histogram import Histogram


def _route(path: str) -> str:
    """A label for a path, out of a fixed set: paths are the client's, and labels must be bounded."""
    known = (
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/admin/status",
        "/admin/cache/flush",
        "/metrics",
    )
    if path in known or path == "/health":
        return path
    for ending in ("/infer", "/infer_many", "/ready", "/live"):
        if path.startswith("/v2/") and path.endswith(ending):
            return "/v2" + ending
    return "other"


class GatewayMetrics:
    """Counts and times the requests of one gateway."""

    def __init__(self) -> None:
        self._statuses: Counter[tuple[str, int]] = Counter()
        self._durations: dict[str, Histogram] = {}
        self._first_bytes: dict[str, Histogram] = {}
        self._running = 0

    def observe(self, app: ASGIApp) -> ASGIApp:
        """The application with its requests counted."""

        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await self._observe_request(app, scope, receive, send)

        return observed

    async def _observe_request(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        route, started = _route(scope["path"]), time.monotonic()
        status, has_body = 499, False  # a client that left before it was answered

        async def watch(message: Message) -> None:
            nonlocal status, has_body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not has_body and message.get("body"):
                has_body = True
                self._first_bytes.setdefault(route, Histogram()).add(time.monotonic() - started)
            await send(message)

        self._running += 1
        try:
            await app(scope, receive, watch)
        finally:
            self._running -= 1
            self._statuses[route, status] += 1
            self._durations.setdefault(route, Histogram()).add(time.monotonic() - started)

    def snapshot(self) -> dict[str, Any]:
        """Plain values, to be sent to the gateway that renders the page."""
        return {
            "running": self._running,
            "statuses": [[route, status, count] for (route, status), count in self._statuses.items()],
            "durations": {route: h.snapshot() for route, h in self._durations.items()},
            "first_bytes": {route: h.snapshot() for route, h in self._first_bytes.items()},
        }
