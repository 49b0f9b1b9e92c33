"""Routes for operators and probes: health, metrics, status."""

from __future__ import annotations

import orjson

from .call import Call


async def health(call: Call) -> None:
    """`GET /health`: the process lives and knows its model; 503 before that."""
    name = call.context.model.name
    await call.respond(orjson.dumps({"status": "ok", "model": name}))


async def metrics(call: Call) -> None:
    """`GET /metrics`."""
    body, content_type = await call.context.metrics()
    await call.respond(body, content_type.encode("latin-1"))


async def status(call: Call) -> None:
    """`GET /admin/status`."""
    page = await call.context.status()
    await call.respond(orjson.dumps(page, default=str, option=orjson.OPT_NON_STR_KEYS))
