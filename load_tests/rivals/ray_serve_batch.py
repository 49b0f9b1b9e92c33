"""The layer behind Ray Serve with `@serve.batch`: one deployment, as Serve's guide to batching has it.

Which ingress Serve has, and its switches for throughput, are in the environment; see `serving_contenders.py`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import ray
from moe_layer import MAX_BATCH_REQUESTS, MAX_WAIT_S, Options, options
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import Response

QUIET = {"enable_access_log": False, "log_level": "ERROR"}


class Layer:
    """A replica."""

    def __init__(self, chosen: Options) -> None:
        self._layer = chosen.layer()

    @serve.batch(max_batch_size=MAX_BATCH_REQUESTS, batch_wait_timeout_s=MAX_WAIT_S)
    async def compute(self, bodies: list[bytes]) -> list[bytes]:
        """A batch."""
        return self._layer.many(bodies)

    async def __call__(self, request: Request) -> Response:
        """One request."""
        return Response(await self.compute(await request.body()), media_type="application/octet-stream")


def main() -> None:
    """Serve until a signal."""
    chosen = options()
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=chosen.port), logging_config=QUIET)
    deployment = serve.deployment(
        num_replicas=chosen.workers,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(chosen.threads)}}},
    )(Layer)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        serve.run(deployment.bind(chosen), logging_config=QUIET)
        signal.pause()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
