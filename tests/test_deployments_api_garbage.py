"""What a request leaves behind is freed at once. The garbage collector comes by seldom in processes that serve,
and cycles that hold bodies would pile up until it does."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_gateway import HIDDEN, MODEL, FakeGateway
from pimoe.deployments.api import create_app
from pimoe.runtime.caching import BypassReason, CachedBackend, CacheLimits, ResultCache
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError
from pimoe.runtime.requests import GenerateRequest, InferAnswer, InferRequest, InferResult, TokenChunk


class Backend:
    """Answers with the request's own tensor, fails, or hangs."""

    model = MODEL

    def __init__(self, outcome: Callable[[], Exception] | str) -> None:
        self.outcome = outcome

    async def infer(self, request: InferRequest) -> InferResult:
        await asyncio.sleep(30 if self.outcome == "hangs" else 0)
        if callable(self.outcome):
            raise self.outcome()
        return InferResult(request.hidden_states)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        raise NotImplementedError


class Gateway(FakeGateway):
    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.cached = CachedBackend(backend, ResultCache(CacheLimits()))

    async def infer(self, request: InferRequest, bypass: BypassReason | None) -> InferAnswer:
        return await self.cached.infer(request, bypass)

    def recall(self, hits: Sequence[object]) -> bool:
        return self.cached.recall(hits)


async def post(app: Any, body: bytes, headers: dict[bytes, bytes]) -> int:
    """One request; its status."""
    statuses: list[int] = []
    bodies = [body]

    async def receive() -> dict[str, Any]:
        if not bodies:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    given = {b"inference-header-content-length": b"0", **headers}
    path = "/v2/models/echo/infer"
    await app(
        {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": list(given.items())},
        receive,
        send,
    )
    return statuses[0]


@pytest.mark.parametrize("cache", [b"true", b"false"], ids=["cache", "bypass"])
@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("answers", 200),
        (lambda: OverloadedError("full", retry_after_s=1.0), 429),
        (lambda: DeadlineExceededError("too late"), 504),
        (lambda: ZeroDivisionError(), 500),
        ("hangs", 504),
    ],
    ids=["answered", "overloaded", "expired", "broken", "hanging"],
)
async def test_a_request_leaves_no_cycles_behind(outcome: Any, status: int, cache: bytes) -> None:
    app = create_app(Gateway(Backend(outcome)))
    headers = {b"x-pimoe-cache": cache, b"x-pimoe-timeout": b"0.05"}
    bodies = [np.full((3, HIDDEN), value, np.float32).tobytes() for value in range(6)]
    assert await post(app, bodies.pop(), headers) == status  # what is made once only
    gc.collect()
    gc.disable()
    try:
        for body in bodies:
            assert await post(app, body, headers) == status
        await asyncio.sleep(0.01)  # what was cancelled ends
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = Counter(type(each).__name__ for each in gc.garbage)
        # Fewer than one for each request: what others in this process left is not ours.
        assert left["frame"] + left["Flight"] + left["InferRequest"] < len(bodies), left
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
