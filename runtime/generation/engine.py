"""The engine: one step after the other, each advancing all running sequences together.

`step` is the whole system: admit, plan, compute, sample, hand out. Its computing waits for nothing but the
experts. Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

import torch

from ..batching import BatchLimits, PriorityQueue, QueueItem, QueueLimits
from ..batching.policy import virtual_deadline
from ..batching.queue import QueueStatistics
from ..errors import DeadlineExceededError, PimoeError, RequestCancelledError
from ..model.decoder import Decoder, ForwardBatch, Segment
from ..requests import GenerateRequest, TokenChunk, TokenLogprob
from ..routing.dispatch import Dispatcher
from .rules import banned_tokens, check_request, finish_reason
from .sampler import sample
from .scheduler import EngineLimits, Generation, StepItem, can_admit, plan_step

_log = logging.getLogger(__name__)


class EngineStatistics(NamedTuple):
    """The queue, what runs, the KV cache, and since start: steps, tokens prefilled, decoded; seconds of steps."""

    queue: QueueStatistics
    running: int
    kv_bytes: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    step_s: float


class _Stream:
    """Where a request's chunks go; `Engine.generate` reads them. Bounded by the request's `max_tokens`."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.generation: Generation | None = None
        self.chunks: asyncio.Queue[TokenChunk | PimoeError] = asyncio.Queue()

    def fail(self, error: PimoeError) -> None:
        self.chunks.put_nowait(error)


class Engine:
    """Generates with a decoder whose experts are behind a dispatcher.

    Args:
        clock: monotonic seconds; tests inject theirs.
    """

    def __init__(
        self,
        decoder: Decoder,
        dispatcher: Dispatcher,
        limits: EngineLimits,
        batch_limits: BatchLimits,
        queue_limits: QueueLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decoder, self.dispatcher, self.limits, self.batch_limits = decoder, dispatcher, limits, batch_limits
        bounds = (decoder.spec.max_context_tokens, limits.max_context_tokens, limits.max_kv_tokens)
        self.max_context_tokens = min(bound for bound in bounds if bound is not None)
        self.queue: PriorityQueue[_Stream] = PriorityQueue(queue_limits)
        self.cache = decoder.new_cache(limits.max_sequences, self.max_context_tokens)
        # A config may name end tokens that its vocabulary lacks.
        vocab = decoder.spec.vocab_size
        self._end_tokens = tuple(token for token in decoder.spec.eos_token_ids if token < vocab)
        self._clock = clock
        self._closing = False
        self._running: list[Generation] = []
        self._streams: dict[Generation, _Stream] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop_task: asyncio.Task[None] | None = None
        self._computing: asyncio.Task[torch.Tensor] | None = None
        self._steps = self._prefill_tokens = self._decode_tokens = 0
        self._step_s = 0.0

    def start(self) -> None:
        """Begin to run steps."""
        self._loop_task = asyncio.create_task(self._run(), name="engine")

    @property
    def alive(self) -> bool:
        """Whether steps are run; false when the loop has ended, as it must not."""
        return self._loop_task is not None and not self._loop_task.done()

    async def close(self) -> None:
        """Refuse what comes, fail what waits, let run what runs for `limits.drain_s`, then fail that too."""
        self._closing = True
        self.queue.drain(RequestCancelledError("the server is shutting down"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_s):
                await self._idle.wait()
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        self._fail(self._running, RequestCancelledError("the server is shutting down"))
        self._remove_finished()

    def statistics(self) -> EngineStatistics:
        """See `EngineStatistics`."""
        return EngineStatistics(
            self.queue.statistics(),
            len(self._running),
            self.cache.bytes,
            self._steps,
            self._prefill_tokens,
            self._decode_tokens,
            self._step_s,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Queue a request and stream its tokens. Closing the iterator frees its place at once when it waits, and
        after the step under way when it runs.

        Raises:
            ContextLengthError, InvalidRequestError: the request can never run here.
            OverloadedError: the queue is full.
            DeadlineExceededError: its time ran out.
            RequestCancelledError: the engine is closing.
        """
        check_request(request, self.decoder.spec.vocab_size, self.max_context_tokens)
        if self._closing:
            raise RequestCancelledError("the server is shutting down")
        if emitted := request.emitted:
            reason = finish_reason(request, emitted[-1], len(emitted), self._end_tokens)
            if reason is not None:
                yield TokenChunk((), reason)  # only the end had been lost
                return
        now = self._clock()
        deadline = now + request.timeout_s
        stream = _Stream(request)
        item = QueueItem(
            value=stream,
            tokens=len(request.prompt_token_ids),
            priority=request.priority,
            arrival=now,
            deadline=deadline,
            key=virtual_deadline(now, deadline, request.priority, self.batch_limits),
            fail=stream.fail,
        )
        self.queue.push(item)
        self._wake.set()
        # One timer for the whole request: one for each token costs a tenth of a large decode step. It is for steps
        # that hang; `step` looks at the deadlines itself.
        timer = asyncio.get_running_loop().call_later(max(0.0, request.timeout_s), self._expire, stream)
        try:
            while True:
                chunk = await stream.chunks.get()
                if isinstance(chunk, PimoeError):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            timer.cancel()
            self.queue.cancel(item)
            self._abandon(stream)

    def _expire(self, stream: _Stream) -> None:
        stream.fail(DeadlineExceededError("the request's time ran out"))
        self._abandon(stream)

    def _abandon(self, stream: _Stream) -> None:
        generation = stream.generation
        if generation is None or generation.finished:
            return
        generation.finished = True
        if self._computing is not None and all(g.finished for g in self._running):
            self._computing.cancel()  # nobody is left to compute the step for

    async def _run(self) -> None:
        while True:
            if not self._running and not len(self.queue):
                self._wake.clear()
                self._idle.set()
                await self._wake.wait()
                self._idle.clear()
            await self.step()

    async def step(self) -> None:
        """Advance every running sequence; what fails fails its sequences, never the engine."""
        started = self._clock()
        late = [generation for generation in self._running if generation.deadline <= started]
        self._fail(late, DeadlineExceededError("the request's time ran out"))
        self._remove_finished()
        self._admit(started)
        items = plan_step(self._running, self.limits.max_step_tokens)
        if not items:
            await asyncio.sleep(0)
            return
        try:
            logits = await self._compute(items)
            self._hand_out(items, logits)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # the engine is being closed, not just this step abandoned
            self._fail([item.generation for item in items], PimoeError("the step failed: it was cancelled"))
        except Exception as error:  # a model's failure is its sequences' outcome
            if not isinstance(error, PimoeError):
                _log.error("a step failed", exc_info=error)
                error = PimoeError(f"the step failed: {type(error).__name__}")
            self._fail([item.generation for item in items], error)
        self._steps += 1
        self._step_s += self._clock() - started
        await asyncio.sleep(0)  # let chunks out and requests in, also when no expert had to be waited for

    def _admit(self, now: float) -> None:
        self.queue.expire(now)
        while (head := self.queue.head()) is not None:
            request = head.value.request
            reserved = len(request.prompt_token_ids) + request.sampling.max_tokens
            if not can_admit(self._running, reserved, self.limits):
                return
            stream = self.queue.pop().value
            generation = Generation(
                request=request,
                slot=self.cache.allocate(),
                deadline=head.deadline,
                tokens=[*request.prompt_token_ids, *request.emitted],
            )
            stream.generation = generation
            self._running.append(generation)
            self._streams[generation] = stream

    async def _compute(self, items: Sequence[StepItem]) -> torch.Tensor:
        token_ids: list[int] = []
        segments = []
        rows = []
        for item in items:
            start = item.generation.computed
            token_ids += item.generation.tokens[start : start + item.count]
            segments.append(Segment(item.generation.slot, start, item.count))
            if item.samples:
                rows.append(len(token_ids) - 1)
        batch = ForwardBatch(torch.tensor(token_ids), tuple(segments), torch.tensor(rows, dtype=torch.int64))
        # Readers leave at their own deadlines; the step goes on for the last of them. On the loop's clock.
        remaining_s = max(item.generation.deadline for item in items) - self._clock()
        experts = self.dispatcher.until(asyncio.get_running_loop().time() + remaining_s)
        self._computing = asyncio.ensure_future(self.decoder.forward(batch, self.cache, experts))
        try:
            return await self._computing
        finally:
            self._computing = None

    def _hand_out(self, items: Sequence[StepItem], logits: torch.Tensor) -> None:
        sampling = [item.generation for item in items if item.samples]
        for item in items:
            item.generation.computed += item.count
            if item.count == 1 and item.generation.generated:
                self._decode_tokens += 1
            else:
                self._prefill_tokens += item.count
        with torch.inference_mode():
            tokens, logprobs = sample(
                logits,
                [g.request.sampling for g in sampling],
                [len(g.tokens) for g in sampling],
                [banned_tokens(g.request, g.generated, self._end_tokens) for g in sampling],
            )
        for generation, token, logprob in zip(sampling, tokens, logprobs, strict=True):
            self._append(generation, token, logprob)

    def _append(self, generation: Generation, token: int, logprob: TokenLogprob | None) -> None:
        generation.tokens.append(token)
        if generation.finished:
            return  # its reader left during the step
        reason = finish_reason(generation.request, token, generation.generated, self._end_tokens)
        generation.finished = reason is not None
        chunk = TokenChunk((token,), reason, None if logprob is None else (logprob,))
        self._streams[generation].chunks.put_nowait(chunk)

    def _fail(self, generations: Sequence[Generation], error: PimoeError) -> None:
        for generation in generations:
            if not generation.finished:
                generation.finished = True
                self._streams[generation].fail(error)

    def _remove_finished(self) -> None:
        for generation in [g for g in self._running if g.finished]:
            self._running.remove(generation)
            del self._streams[generation]
            self.cache.free(generation.slot)
