"""Computes one step of the engine: what the scheduler planned as a batch for the decoder, and its logits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import torch

from ..batching import LatencyModel
from ..model.decoder import Decoder, ForwardBatch, Segment
from ..model.kv_cache import KVCache
from ..routing.dispatch import Dispatcher
from .scheduler import StepItem


class StepRunner:
    """Runs forwards, one step at a time, and learns how long they take.

    Args:
        latency: learns from every step.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        dispatcher: Dispatcher,
        latency: LatencyModel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decoder, self.cache, self.dispatcher, self.latency = decoder, cache, dispatcher, latency
        self._clock = clock
        self._computing: asyncio.Future[torch.Tensor] | None = None

    async def run(self, items: Sequence[StepItem], timeout_s: float) -> torch.Tensor:
        """The logits that `items` want, `[outputs, vocab]` in their order. A step that fails or is cancelled may
        be run again.

        Args:
            timeout_s: for the experts.

        Raises:
            Whatever the experts raise.
        """
        experts = self.dispatcher.until(asyncio.get_running_loop().time() + timeout_s)
        batch = _batch(items)
        started = self._clock()
        self._computing = asyncio.ensure_future(self.decoder.forward(batch, self.cache, experts))
        try:
            logits = await self._computing
        finally:
            self._computing = None
        self.latency.observe(len(batch.token_ids), experts.largest_expert_tokens, self._clock() - started)
        return logits

    def cancel(self) -> None:
        """Give the step under way up, if there is one."""
        if self._computing is not None:
            self._computing.cancel()


def _batch(items: Sequence[StepItem]) -> ForwardBatch:
    token_ids: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    for item in items:
        generation, start = item.generation, item.generation.computed
        token_ids += generation.tokens[start : start + item.count]
        segments.append(Segment(generation.blocks, start, item.count))
        rows += range(len(token_ids) - item.outputs, len(token_ids))
    return ForwardBatch(torch.tensor(token_ids), tuple(segments), torch.tensor(rows, dtype=torch.int64))
