"""The engine: one step after the other, each advancing all running sequences together.

`step` is the whole system: admit, plan, compute, sample, hand out. Its computing waits for nothing but the
experts. Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import torch

from ..batching import (
    BatchLimits,
    LatencyModel,
    PriorityQueue,
    QueueItem,
    QueueLimits,
)
from ..batching.policy import sort_key
from ..errors import DeadlineExceededError, InvalidRequestError, PimoeError, RequestCancelledError
from ..histogram import Histogram
from ..model.decoder import Decoder
from ..requests import GenerateRequest, TokenChunk, TokenLogprob
from ..routing.dispatch import Dispatcher
from .admission import Admission
from .block_pool import BlockPool
from .engine_statistics import EngineStatistics
from .grammar import GrammarMatcher
from .grammar_compiler import GrammarCompiler
from .kv_memory import count_blocks, free_bytes
from .limits import EngineLimits
from .prompt_scores import note_prompt_logprobs
from .rules import check_request, finish_reason
from .sampler import sample
from .sampling_state import SamplingState
from .scheduler import Generation, Scheduler, StepItem
from .step_runner import StepRunner
from .stream import Stream, TokenTimes

_log = logging.getLogger(__name__)


class Engine:
    """Generates with a decoder whose experts are behind a dispatcher.

    Args:
        clock: monotonic seconds; tests inject theirs.
        folder: of the checkpoint, whose tokenizer grammars need; None: requests with a grammar are refused.
    """

    def __init__(
        self,
        decoder: Decoder,
        dispatcher: Dispatcher,
        limits: EngineLimits,
        batch_limits: BatchLimits,
        queue_limits: QueueLimits,
        clock: Callable[[], float] = time.monotonic,
        folder: Path | None = None,
    ) -> None:
        self.decoder, self.dispatcher, self.limits, self.batch_limits = decoder, dispatcher, limits, batch_limits
        longest = min(
            decoder.spec.max_context_tokens, limits.max_context_tokens or decoder.spec.max_context_tokens
        )
        blocks = count_blocks(limits, decoder.kv_layout, longest, decoder.dtype, free_bytes(decoder.device))
        self.max_context_tokens = min(longest, blocks * limits.block_tokens)
        self.queue: PriorityQueue[Stream] = PriorityQueue(queue_limits)
        self.latency = LatencyModel(limits.max_step_tokens)
        self.cache = decoder.new_cache(blocks, limits.block_tokens)
        self.scheduler = Scheduler(BlockPool(blocks, limits.block_tokens, limits.reuse_prefixes), limits)
        self._admission = Admission(self.queue, self.scheduler, self.latency, limits.max_sequences)
        self.runner = StepRunner(decoder, self.cache, dispatcher, self.latency, limits.micro_batches, clock)
        # A config may name end tokens that its vocabulary lacks.
        vocab = decoder.spec.vocab_size
        self._end_tokens = tuple(token for token in decoder.spec.eos_token_ids if token < vocab)
        self._grammars = None if folder is None else GrammarCompiler(folder, vocab, self._end_tokens)
        self._clock = clock
        self._closing = False
        self._streams: dict[Generation, Stream] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop_task: asyncio.Task[None] | None = None
        self._steps = self._prefill_tokens = self._decode_tokens = 0
        self._step_s = 0.0
        self._times = TokenTimes(Histogram(), Histogram())

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
        if self._grammars is not None:
            self._grammars.close()

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
            self._times.first.snapshot(),
            self._times.between.snapshot(),
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
        arrived = self._clock()
        check_request(request, self.decoder.spec.vocab_size, self.max_context_tokens)
        if self._closing:
            raise RequestCancelledError("the server is shutting down")
        if emitted := request.emitted:
            reason = finish_reason(request, emitted[-1], len(emitted), self._end_tokens)
            if reason is not None:
                yield TokenChunk((), reason)  # only the end had been lost
                return
        grammar = await self._grammar_of(request)
        state = SamplingState(request, self.decoder.spec.vocab_size, self._end_tokens, grammar)
        if state.finished_by_grammar:
            yield TokenChunk((), "stop")
            return
        stream = Stream(request, state, self._times, arrived)
        item = self._new_item(stream, arrived)
        if self._closing:
            raise RequestCancelledError("the server is shutting down")
        if self._admission.is_hopeless(item):
            raise self.queue.refusal(item, "more waits before this request than can be done in its time")
        self.queue.push(item)
        self._wake.set()
        # One timer for the whole request: one for each token costs a tenth of a large decode step. It is for steps
        # that hang; `step` looks at the deadlines itself.
        timer = asyncio.get_running_loop().call_later(
            max(0.0, item.deadline - self._clock()), self._expire, stream
        )
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

    async def _grammar_of(self, request: GenerateRequest) -> GrammarMatcher | None:
        sampling = request.sampling
        if not sampling.grammar_kind:
            return None
        if self._grammars is None:
            raise InvalidRequestError("structured output needs the checkpoint's tokenizer", "grammar")
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        return await self._grammars.compile(sampling.grammar_kind, sampling.grammar, deadline)

    def _new_item(self, stream: Stream, now: float) -> QueueItem[Stream]:
        request = stream.request
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

    def _expire(self, stream: Stream) -> None:
        stream.fail(DeadlineExceededError("the request's time ran out"))
        self._abandon(stream)

    def _abandon(self, stream: Stream) -> None:
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
        for stream in self._admission.admit(started):
            assert stream.generation is not None
            self._streams[stream.generation] = stream
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
            generations = [item.generation for item in items if item.samples]
            last = logits
            if len(generations) != len(logits) or any(g.wants_prompt_logprobs for g in generations):
                last = _without_prompts(items, logits)
            states = [self._streams[generation].state for generation in generations]
            tokens, logprobs = sample(last, states, [len(generation.tokens) for generation in generations])
        self.scheduler.advance(items)
        self._fail_broken(generations, last)
        now = self._clock()
        for generation, token, logprob in zip(generations, tokens, logprobs, strict=True):
            self._append(generation, token, logprob, now)

    def _fail_broken(self, generations: Sequence[Generation], logits: torch.Tensor) -> None:
        """End sequences whose numbers overflowed, with those of them that are cached known to nobody."""
        # One NaN in a hidden state is in all of its logits: the first one tells.
        if not len(logits) or bool(logits[:, 0].isfinite().all()):
            return
        for generation, first in zip(generations, logits[:, 0].tolist(), strict=True):
            if not math.isfinite(first):
                self.scheduler.distrust(generation)
                text = f"the model's numbers overflowed {str(self.decoder.dtype).removeprefix('torch.')}"
                self._fail([generation], PimoeError(text))

    def _append(self, generation: Generation, token: int, logprob: TokenLogprob | None, now: float) -> None:
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
        stream.put(token, reason, logprob, now)

    def _fail(self, generations: Sequence[Generation], error: PimoeError) -> None:
        for generation in generations:
            if not generation.finished:
                generation.finished = True
                self._streams[generation].fail(error)

    def _remove_finished(self) -> None:
        for generation in [g for g in self._streams if g.finished]:
            self.scheduler.remove(generation)
            self._admission.note_end(self._clock() - generation.admitted)
            del self._streams[generation]


def _without_prompts(items: Sequence[StepItem], logits: torch.Tensor) -> torch.Tensor:
    """Notes logprobs of prompts; the rows that tokens are chosen from, possibly none."""
    rows = torch.split(logits, [item.outputs for item in items])
    for item, item_logits in zip(items, rows, strict=True):
        if item.generation.wants_prompt_logprobs:
            note_prompt_logprobs(item, item_logits)
    return torch.cat([logits[:0], *(each[-1:] for item, each in zip(items, rows, strict=True) if item.samples)])
