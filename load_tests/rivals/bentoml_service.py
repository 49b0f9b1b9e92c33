"""The layer behind BentoML with adaptive batching.

Its window is not a fixed one: it is learnt from the traffic, and `max_latency_ms` is where requests are given up
rather than how long a batch is waited for, so that stays at its default.
"""

# BentoML reads annotations, so they must not become strings.
import os
import sys
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
from _bentoml_sdk.io_models import IORootModel
from moe_layer import MAX_BATCH_REQUESTS, options
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response


class RawTensor(IORootModel[Any]):
    """The bytes of `[tokens, hidden]` in float32; of BentoML's own formats only JSON is left for an array that is
    a whole body."""

    __root_input__ = True

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Any:
        """An array of one request."""
        return np.frombuffer(await request.body(), np.float32)[None]

    @classmethod
    async def to_http_response(cls, obj: Any, serde: Any) -> Response:
        """And back."""
        return Response(obj.tobytes(), media_type="application/octet-stream")


@bentoml.service(
    workers=options().workers, traffic={"timeout": 60, "max_concurrency": 1000}, metrics={"enabled": False}
)
class MoeService:
    """The service that `bentoml serve` starts."""

    def __init__(self) -> None:
        self._layer = options().layer()

    @bentoml.api(
        route="/infer",
        batchable=True,
        max_batch_size=MAX_BATCH_REQUESTS,
        input_spec=RawTensor,
        output_spec=RawTensor,
    )
    def infer(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[requests, values]`."""
        return self._layer.array(values.reshape(-1)).reshape(values.shape)


def main() -> None:
    """Serve until a signal."""
    here = Path(__file__)
    where = ["--working-dir", str(here.parent), "--host", "127.0.0.1", "--port", str(options().port)]
    command = [sys.executable, "-m", "bentoml", "serve", f"{here.stem}:MoeService", *where]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
