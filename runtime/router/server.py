"""A router's end of its links to gateways."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable

from ..errors import InvalidRequestError
from ..links import Call, Reply
from ..requests import Backend, GenerateRequest, InferRequest

INFER = "infer"
GENERATE = "generate"


class RouterHandler:
    """Answers "infer" with a tensor and "generate" with a stream of token chunks, from any backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, call: Call) -> Awaitable[Reply] | AsyncIterator[Reply]:
        """See `LinkServer`.

        Raises:
            InvalidRequestError: no such method.
        """
        remaining_s = call.deadline - time.monotonic()
        if call.method == GENERATE:
            return self._generate(GenerateRequest.from_wire(call.meta, remaining_s))
        if call.method == INFER and len(call.tensors) == 1:
            return self._infer(
                InferRequest(
                    request_id=call.meta["id"],
                    hidden_states=call.tensors[0],
                    layer=call.meta["layer"],
                    priority=call.meta["priority"],
                    timeout_s=remaining_s,
                )
            )
        raise InvalidRequestError(f"a router does not answer {call.method!r} with {len(call.tensors)} tensors")

    async def _infer(self, request: InferRequest) -> Reply:
        result = await self.backend.infer(request)
        return Reply({}, [result.output])

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[Reply]:
        async with contextlib.aclosing(self.backend.generate(request)) as chunks:
            async for chunk in chunks:
                yield Reply(chunk.to_wire())
