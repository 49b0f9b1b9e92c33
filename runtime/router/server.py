"""A router's end of its links to gateways."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable

from ..errors import InvalidRequestError
from ..links import Call, Packed, Reply
from ..requests import Backend, GenerateRequest, InferRequest
from .wire import pack_result, unpack_request

INFER = "infer"
GENERATE = "generate"


class RouterHandler:
    """Answers "infer", which is packed, with a tensor, and "generate" with a stream of token chunks, from any
    backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, call: Call) -> Awaitable[Packed] | AsyncIterator[Reply]:
        """See `LinkServer`.

        Raises:
            InvalidRequestError: no such method.
        """
        remaining_s = call.deadline - time.monotonic()
        if call.method == INFER and call.packed is not None:
            return self._infer(unpack_request(call.packed, remaining_s))
        if call.method == GENERATE and call.packed is None:
            return self._generate(GenerateRequest.from_wire(call.meta, remaining_s))
        how = "packed" if call.packed is not None else f"with {len(call.tensors)} tensors"
        raise InvalidRequestError(f"a router does not answer {call.method!r} {how}")

    async def _infer(self, request: InferRequest) -> Packed:
        return pack_result(await self.backend.infer(request))

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[Reply]:
        async with contextlib.aclosing(self.backend.generate(request)) as chunks:
            async for chunk in chunks:
                yield Reply(chunk.to_wire())
