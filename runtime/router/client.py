"""A gateway's end: a backend over links to all routers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from ..errors import (
    DeadlineExceededError,
    LinkError,
    RequestCancelledError,
    UnavailableError,
)
from ..links import LinkPool
from ..requests import GenerateRequest, InferRequest, InferResult, ModelInfo, TokenChunk
from .server import GENERATE, INFER
from .wire import pack_request, unpack_result

_log = logging.getLogger(__name__)


class RouterClient:
    """Work goes to the least busy router. When a router dies or shuts down, its tensor requests are sent to
    another, and its generations resumed there from the prompt and the tokens that came already: random numbers are
    keyed by position, so that the rest is what it would have been.

    Args:
        pool: links to the routers; their discovery's `info["model"]` is a `ModelInfo` as plain values.
    """

    def __init__(self, pool: LinkPool) -> None:
        self.pool = pool
        self._model: ModelInfo | None = None
        self._seen: object = None  # what discovery had found when `_model` was made

    @property
    def model(self) -> ModelInfo:
        """See `Backend`.

        Raises:
            UnavailableError: no router has been seen yet.
        """
        if self._model is not None and self.pool.endpoints is self._seen:
            return self._model
        self._seen = self.pool.endpoints
        wires = [endpoint.info["model"] for endpoint in self.pool.endpoints.values()]
        if wires:
            # Routers may have memory for contexts of different lengths: any of them may get a request.
            least = min(wire["max_context_tokens"] for wire in wires)
            found = (wires[0]["weights_digest"], least)
            if self._model is None or found != (self._model.weights_digest, self._model.max_context_tokens):
                self._model = ModelInfo.from_wire({**wires[0], "max_context_tokens": least})
        if self._model is None:
            raise UnavailableError("no router is ready yet", retry_after_s=1.0)
        return self._model

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Backend`."""
        deadline = time.monotonic() + request.timeout_s
        return unpack_result(await self.pool.call_packed(INFER, pack_request(request), deadline))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `Backend`."""
        deadline = time.monotonic() + request.timeout_s
        emitted = list(request.emitted)
        while True:
            attempt = _rest(request, emitted)
            async with self.pool.acquire(deadline) as link:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise DeadlineExceededError("the request's time ran out")
                try:
                    async with contextlib.aclosing(
                        link.client.stream(GENERATE, attempt.to_wire(), [], remaining_s)
                    ) as replies:
                        async for reply in replies:
                            chunk = TokenChunk.from_wire(reply.meta)
                            if emitted:  # what first chunks tell was told by an earlier router
                                chunk = replace(chunk, cached_tokens=0, prompt_logprobs=None)
                            emitted += chunk.token_ids
                            yield chunk
                            if chunk.finish_reason is not None:
                                return
                    _log.error("%s ended a stream without a finish reason", link.endpoint.replica_id)
                    self.pool.forget(link)
                except LinkError:
                    if not link.client.closed:
                        raise  # of a link behind the router
                except (UnavailableError, RequestCancelledError):
                    if not link.client.draining:
                        raise
                self.pool.resent += 1


def _rest(request: GenerateRequest, emitted: list[int]) -> GenerateRequest:
    """What is still to be generated; logprobs of the prompt came with the first token."""
    if len(emitted) == len(request.emitted):
        return request
    return replace(request, emitted=tuple(emitted), sampling=replace(request.sampling, prompt_logprobs=None))
