"""Computes one step of the engine: what the scheduler planned as one batch for the decoder, or as two
micro-batches in flight at once, and its logits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..batching import LatencyModel
from ..model.decoder import Decoder, ForwardBatch, Segment
from ..model.kv_cache import KVCache
from ..routing.dispatch import Dispatcher
from ..tasks import gather_or_cancel
from .micro_batches import ForwardTimes, MicroBatching, MicroBatchModel, split_point
from .scheduler import StepItem


class _Forward(NamedTuple):
    """One forward's logits, and what it cost; `expert_s` is not in the times yet."""

    logits: Tensor
    tokens: int
    trunk_s: float
    waited_s: float
    largest_expert_tokens: int


class StepRunner:
    """Runs forwards, one step at a time, and learns how long they take.

    Args:
        latency: learns from every step.
        micro_batching: whether steps run as two micro-batches; see `micro_batches`.
        clock: monotonic seconds.

    Attributes:
        micro_batches: decides, and learns what two of them gain.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        dispatcher: Dispatcher,
        latency: LatencyModel,
        micro_batching: MicroBatching = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decoder, self.cache, self.dispatcher, self.latency = decoder, cache, dispatcher, latency
        self.micro_batches = MicroBatchModel(micro_batching, bool(dispatcher.computed_s()))
        self._clock = clock
        self._computing: asyncio.Future[Tensor] | None = None

    async def run(self, items: Sequence[StepItem], timeout_s: float) -> Tensor:
        """The logits that `items` want, `[outputs, vocab]` in their order. A step that fails or is cancelled may
        be run again.

        Args:
            timeout_s: for the experts.

        Raises:
            Whatever the experts raise.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        counts = [item.count for item in items]
        self.micro_batches.parallelism = self.dispatcher.parallelism()
        in_two = len(items) > 1 and self.micro_batches.wants_two(sum(counts))
        step = self._in_two(items, split_point(counts), deadline) if in_two else self._in_one(items, deadline)
        self._computing = asyncio.ensure_future(step)
        try:
            return await self._computing
        finally:
            self._computing = None

    def cancel(self) -> None:
        """Give the step under way up, if there is one."""
        if self._computing is not None:
            self._computing.cancel()

    async def _in_one(self, items: Sequence[StepItem], deadline: float) -> Tensor:
        started, computed_s = self._clock(), self.dispatcher.computed_s()
        forward = await self._forward(items, deadline, lanes=True)
        self.latency.observe(forward.tokens, forward.largest_expert_tokens, self._clock() - started)
        expert_s = max(self._computed_since(computed_s), default=0.0)
        self.micro_batches.observe_one(ForwardTimes(forward.tokens, forward.trunk_s, expert_s, forward.waited_s))
        return forward.logits

    async def _in_two(self, items: Sequence[StepItem], point: int, deadline: float) -> Tensor:
        started, computed_s = self._clock(), self.dispatcher.computed_s()
        parts = [self._forward(part, deadline, lanes=False) for part in (items[:point], items[point:])]
        first, second = await gather_or_cancel(parts)
        total_s, tokens = self._clock() - started, first.tokens + second.tokens
        largest = max(first.largest_expert_tokens, second.largest_expert_tokens)
        self.latency.observe(tokens, largest, total_s)
        # Which of the two the groups computed for, they do not say.
        expert_s = max(self._computed_since(computed_s), default=0.0)
        times = [
            ForwardTimes(part.tokens, part.trunk_s, expert_s * part.tokens / tokens, part.waited_s)
            for part in (first, second)
        ]
        self.micro_batches.observe_two(times[0], times[1], total_s)
        return torch.cat([first.logits, second.logits])

    def _computed_since(self, before: Sequence[float]) -> list[float]:
        return [now - then for now, then in zip(self.dispatcher.computed_s(), before, strict=True)]

    async def _forward(self, items: Sequence[StepItem], deadline: float, lanes: bool) -> _Forward:
        # Over lanes this thread waits for the experts, and would not compute the other micro-batch meanwhile.
        batch = _batch(items)
        experts = self.dispatcher.until(deadline, lanes)
        started = self._clock()
        logits = await self.decoder.forward(batch, self.cache, experts)
        trunk_s = max(0.0, self._clock() - started - experts.waited_s)
        tokens = len(batch.token_ids)
        return _Forward(logits, tokens, trunk_s, experts.waited_s, experts.largest_expert_tokens)


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
