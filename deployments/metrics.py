"""What a gateway counts of its own requests. `metrics_page.py` turns it, and all else, into the page."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from functools import lru_cache
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.histogram import Histogram


@lru_cache(maxsize=256)
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
        self._durations: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._first_bytes: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._running = 0

    def observe(self, app: ASGIApp) -> ASGIApp:
        """The application with its requests counted."""

        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await self.run(app, scope, receive, send)

        return observed

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of `app`, counted."""
        route, started = _route(scope["path"]), time.monotonic()
        status, has_body = 499, False  # a client that left before it was answered

        async def watch(message: Message) -> None:
            nonlocal status, has_body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not has_body and message.get("body"):
                has_body = True
                self._first_bytes[route].add(time.monotonic() - started)
            await send(message)

        self._running += 1
        try:
            await app(scope, receive, watch)
        finally:
            self._running -= 1
            self._statuses[route, status] += 1
            self._durations[route].add(time.monotonic() - started)

    def snapshot(self) -> dict[str, Any]:
        """Plain values, to be sent to the gateway that renders the page."""
        return {
            "running": self._running,
            "statuses": [[route, status, count] for (route, status), count in self._statuses.items()],
            "durations": {route: h.snapshot() for route, h in self._durations.items()},
            "first_bytes": {route: h.snapshot() for route, h in self._first_bytes.items()},
        }
