"""The layer behind Starlette and uvicorn, without batching: each request computes by itself, on the event loop."""

from __future__ import annotations

from pathlib import Path

import uvicorn
from moe_layer import options
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def app() -> Starlette:
    """One worker's application."""
    layer = options().layer()

    async def infer(request: Request) -> Response:
        (answer,) = layer.many([await request.body()])
        return Response(answer, media_type="application/octet-stream")

    return Starlette(routes=[Route("/infer", infer, methods=["POST"])])


def main() -> None:
    """Serve until a signal."""
    chosen = options()
    uvicorn.run(
        "starlette_app:app",
        factory=True,
        app_dir=str(Path(__file__).parent),
        port=chosen.port,
        workers=chosen.workers,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
