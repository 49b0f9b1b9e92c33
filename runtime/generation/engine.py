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
from typing import Any, NamedTuple

import torch

from ..batching import (
    BatchLimits,
    LatencyModel,
    OverloadControl,
    PriorityQueue,
    QueueItem,
    QueueLimits,
    QueueStatistics,
)
from ..batching.policy import sort_key
from ..errors import DeadlineExceededError, PimoeError, RequestCancelledError
from ..model.decoder import Decoder
from ..requests import GenerateRequest, TokenChunk, TokenLogprob
from ..routing.dispatch import Dispatcher
from .block_pool import BlockPool, BlockStatistics
from .kv_memory import count_blocks, free_bytes
from .limits import EngineLimits
from .micro_batches import MicroBatchStatistics
from .prompt_scores import note_prompt_logprobs
from .rules import check_request, finish_reason
from .sampler import sample
from .sampling_state import SamplingState
from .scheduler import Generation, Scheduler, StepItem
from .step_runner import StepRunner

_log = logging.getLogger(__name__)


class EngineStatistics(NamedTuple):
    """The queue, what runs and what was preempted, the KV cache (bytes of the blocks in use, and all about them),
    and since start: preemptions, steps, tokens prefilled, decoded; seconds of steps. And what was learnt of how
    long a step takes."""

    queue: QueueStatistics
    running: int
    preempted: int
    kv_bytes: int
    kv_blocks: BlockStatistics
    preemptions: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    step_s: float
    micro_batches: MicroBatchStatistics
    latency: dict[str, Any]

    def as_plain(self) -> dict[str, Any]:
        """Plain values for the status page."""
        parts = {name: getattr(self, name)._asdict() for name in ("queue", "kv_blocks", "micro_batches")}
        return {**self._asdict(), **parts}


class _Stream:
    """Where a request's chunks go; `Engine.generate` reads them. Bounded by the request's `max_tokens`."""

    def __init__(self, request: GenerateRequest, state: SamplingState) -> None:
        self.request, self.state = request, state
        self.generation: Generation | None = None
        self.begun = False
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
        longest = min(
            decoder.spec.max_context_tokens, limits.max_context_tokens or decoder.spec.max_context_tokens
        )
        blocks = count_blocks(limits, decoder.kv_layout, longest, decoder.dtype, free_bytes(decoder.device))
        self.max_context_tokens = min(longest, blocks * limits.block_tokens)
        self.queue: PriorityQueue[_Stream] = PriorityQueue(queue_limits)
        self.latency = LatencyModel(limits.max_step_tokens)
        self._overload = OverloadControl(self.queue, lambda item: 1)
        self._held_s = 0.0  # how long sequences lately ran, smoothed
        self.cache = decoder.new_cache(blocks, limits.block_tokens)
        self.scheduler = Scheduler(BlockPool(blocks, limits.block_tokens, limits.reuse_prefixes), limits)
        self.runner = StepRunner(decoder, self.cache, dispatcher, self.latency, limits.micro_batches, clock)
        # A config may name end tokens that its vocabulary lacks.
        vocab = decoder.spec.vocab_size
        self._end_tokens = tuple(token for token in decoder.spec.eos_token_ids if token < vocab)
        self._clock = clock
        self._closing = False
        self._streams: dict[Generation, _Stream] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop_task: asyncio.Task[None] | None = None
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
        self._fail(list(self._streams), RequestCancelledError("the server is shutting down"))
        self._remove_finished()

    def statistics(self) -> EngineStatistics:
        """See `EngineStatistics`."""
        blocks = self.scheduler.pool.statistics()
        return EngineStatistics(
            self.queue.statistics(),
            len(self.scheduler.running),
            len(self.scheduler.preempted),
            (blocks.held + blocks.kept) * self.cache.bytes_per_block,
            blocks,
            self.scheduler.preemptions,
            self._steps,
            self._prefill_tokens,
            self._decode_tokens,
            self._step_s,
            self.runner.micro_batches.statistics(),
            self.latency.snapshot(),
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Queue a request and stream its tokens. Closing the iterator frees its place at once when it waits, and
        after the step under way when it runs.

        Raises:
            ContextLengthError, InvalidRequestError: the request can never run here.
            OverloadedError: the queue is full, or too long for the request's time, or it was shed.
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
        stream = _Stream(request, SamplingState(request, self.decoder.spec.vocab_size, self._end_tokens))
        item = self._new_item(stream)
        if self._is_hopeless(item):
            raise self.queue.refusal(item, "more waits before this request than can be done in its time")
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

    def _new_item(self, stream: _Stream) -> QueueItem[_Stream]:
        request = stream.request
        now = self._clock()
        deadline = now + request.timeout_s
        tokens = len(request.prompt_token_ids) + len(request.emitted)
        prefill_s = self.latency.predict_s(tokens)
        # What was begun elsewhere already, and lost its router, is not put behind what was not.
        priority = 1.0 if request.emitted else request.priority
        return QueueItem(
            value=stream,
            tokens=tokens,
            priority=priority,
            arrival=now,
            deadline=deadline,
            key=sort_key(self.queue.limits, self.batch_limits, now, deadline, priority, prefill_s),
            fail=stream.fail,
        )

    def _is_hopeless(self, item: QueueItem[_Stream]) -> bool:
        """Whether those that are served before an item surely hold all places for longer than it has: better told
        at once than after all its time."""
        if self.scheduler.has_seat(item.rank) or item.value.request.emitted:
            return False
        rounds_ahead = self.queue.items_above(item.rank - 1) // self.limits.max_sequences
        return rounds_ahead * self._held_s > item.deadline - item.arrival

    def _expire(self, stream: _Stream) -> None:
        stream.fail(DeadlineExceededError("the request's time ran out"))
        self._abandon(stream)

    def _abandon(self, stream: _Stream) -> None:
        generation = stream.generation
        if generation is None or generation.finished:
            return
        generation.finished = True
        if all(g.finished for g in self.scheduler.running):
            self.runner.cancel()  # nobody is left to compute the step for

    async def _run(self) -> None:
        while True:
            if not self._streams and not len(self.queue):
                self._wake.clear()
                self._idle.set()
                await self._wake.wait()
                self._idle.clear()
            await self.step()

    async def step(self) -> None:
        """Advance every running sequence; what fails fails its sequences, never the engine."""
        started = self._clock()
        late = [generation for generation in self._streams if generation.deadline <= started]
        self._fail(late, DeadlineExceededError("the request's time ran out"))
        self._remove_finished()
        self._admit(started)
        items = self.scheduler.plan()
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
        """Who was preempted goes on before anybody of its class or of a lower one begins, and before those of
        higher classes that came so much later that they would be served later, too."""
        self.queue.expire(now)
        entrants = self._next_in_queue(now)
        while True:
            back, item = self.scheduler.first_preempted(), entrants[0] if entrants else None
            if back is not None and (item is None or back.rank >= item.rank or back.key <= item.key):
                if not self.scheduler.admit(back):
                    return
            elif item is None or not self._begin(item, now):
                return
            else:
                entrants.pop(0)

    def _next_in_queue(self, now: float) -> list[QueueItem[_Stream]]:
        """Who would be admitted from the queue, in order."""
        head = self.queue.head()
        if head is None or not self.scheduler.has_seat(head.rank):
            return []  # nobody is given up for a place that the first cannot take
        room = max(1, self.limits.max_sequences - len(self.scheduler.running))
        first, left = self.queue.peek(room)
        backlog_s = len(self.queue) / self.limits.max_sequences * self._held_s
        return self._overload.compose(first, left, room, now, self._held_s, backlog_s)

    def _begin(self, item: QueueItem[_Stream], now: float) -> bool:
        """Whether the next one may be looked at: this one runs, or is given up."""
        if self.scheduler.running and now + self.latency.least_s(item.tokens) > item.deadline:
            self.queue.drop_late([item])  # not even its first token would be in time
            return True
        stream, request = item.value, item.value.request
        generation = Generation(
            request=request,
            rank=item.rank,
            key=item.key,
            number=item.number,
            deadline=item.deadline,
            tokens=[*request.prompt_token_ids, *request.emitted],
            admitted=now,
        )
        if not self.scheduler.admit(generation):
            return False
        self.queue.take([item], now)
        stream.generation = generation
        self._streams[generation] = stream
        return True

    async def _compute(self, items: Sequence[StepItem]) -> torch.Tensor:
        self.cache.clear(self.scheduler.take_fresh())
        # Readers leave at their own deadlines; the step goes on for the last of them.
        remaining_s = max(item.generation.deadline for item in items) - self._clock()
        return await self.runner.run(items, remaining_s)

    def _hand_out(self, items: Sequence[StepItem], logits: torch.Tensor) -> None:
        for item in items:
            if item.count == 1 and item.generation.generated:
                self._decode_tokens += 1
            else:
                self._prefill_tokens += item.count
        with torch.inference_mode():
            rows = torch.split(logits, [item.outputs for item in items])
            for item, item_logits in zip(items, rows, strict=True):
                if item.generation.wants_prompt_logprobs:
                    note_prompt_logprobs(item, item_logits)
            sampling = [index for index, item in enumerate(items) if item.samples]
            generations = [items[index].generation for index in sampling]
            last = logits if len(sampling) == len(logits) else torch.cat([rows[index][-1:] for index in sampling])
            states = [self._streams[generation].state for generation in generations]
            tokens, logprobs = sample(last, states, [len(generation.tokens) for generation in generations])
        self.scheduler.advance(items)
        for generation, token, logprob in zip(generations, tokens, logprobs, strict=True):
            self._append(generation, token, logprob)

    def _append(self, generation: Generation, token: int, logprob: TokenLogprob | None) -> None:
        if generation.finished:
            return  # its reader left during the step
        stream = self._streams[generation]
        stream.state.advance(token)
        if stream.state.error is not None:
            self._fail([generation], stream.state.error)
            return
        generation.tokens.append(token)
        reason = finish_reason(generation.request, token, generation.generated, self._end_tokens)
        if stream.state.finished_by_grammar:
            reason = "stop"
        generation.finished = reason is not None
        first = {} if stream.begun else _first_of(generation)
        stream.begun = True
        stream.chunks.put_nowait(TokenChunk((token,), reason, None if logprob is None else (logprob,), **first))

    def _fail(self, generations: Sequence[Generation], error: PimoeError) -> None:
        for generation in generations:
            if not generation.finished:
                generation.finished = True
                self._streams[generation].fail(error)

    def _remove_finished(self) -> None:
        for generation in [g for g in self._streams if g.finished]:
            self.scheduler.remove(generation)
            held_s = self._clock() - generation.admitted
            self._held_s += (held_s - self._held_s) * (0.1 if self._held_s else 1.0)
            del self._streams[generation]


def _first_of(generation: Generation) -> dict[str, Any]:
    """What only the first chunk tells."""
    told: dict[str, Any] = {"cached_tokens": generation.cached_tokens or 0}
    if generation.request.sampling.prompt_logprobs is not None:
        told["prompt_logprobs"] = tuple(generation.prompt_logprobs)
    return told
