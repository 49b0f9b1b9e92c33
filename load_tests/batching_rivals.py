"""How others form batches, written anew from their sources and documentation, to be compared with pimoe's.

Every one takes work and runs batches as `Batcher` does: `start`, `submit`, `close`. What is the same for all of
them: sizes are tokens, as many batches are in flight, the queue is bounded in tokens, and a caller leaves when its
time is up. A caller that has left no longer counts for the bound. Where a source leaves a choice to its user, the
setting is one that suits the simulated model; it stands at each class.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from pimoe.runtime.batching import CLASS_NAMES, class_of
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError

T = TypeVar("T")

# Runs a batch: values, and how many tokens of each are in it.
RunBatch = Callable[[Sequence[tuple[T, int]]], Awaitable[object]]


@dataclass(frozen=True)
class RivalLimits:
    """What all of them are given.

    Attributes:
        queue_tokens: that may wait.
        max_wait_s: how long a batch is held for company when something downstream is free.
        fill_s: in what time a full batch comes together at full load.
        max_latency_s: half of the median timeout of the most urgent class.
    """

    max_batch_tokens: int
    max_in_flight: int
    queue_tokens: int
    max_wait_s: float
    fill_s: float
    max_latency_s: float


class Job(Generic[T]):
    """A request.

    Attributes:
        tokens: those that were not dispatched yet.
        parts: of it that run now.
        counted_tokens: what it takes of the queue's bound.
        level: 1 is the most urgent.
    """

    def __init__(self, value: T, tokens: int, priority: float) -> None:
        loop = asyncio.get_running_loop()
        self.value = value
        self.tokens = self.counted_tokens = tokens
        self.parts = 0
        self.level = len(CLASS_NAMES) - class_of(priority)
        self.arrival = loop.time()
        self.answer: asyncio.Future[None] = loop.create_future()

    def take(self, room: int) -> int:
        """Tokens of it that a batch with so much room takes."""
        tokens = min(room, self.tokens)
        self.tokens -= tokens
        self.parts += 1
        return tokens

    @property
    def left(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.answer.done()


class Rival(Generic[T]):
    """What they have in common: admission, the caller's deadline, and running a batch."""

    def __init__(self, run_batch: RunBatch[T], limits: RivalLimits) -> None:
        self._run_batch = run_batch
        self._limits = limits
        self._waiting: collections.Counter[int] = collections.Counter()  # tokens by level
        self._tasks: set[asyncio.Task[None]] = set()
        self._free = limits.max_in_flight

    def start(self) -> None:
        """Begin to form batches."""
        self._spawn(self._run())

    async def close(self) -> None:
        """Stop."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, value: T, tokens: int, priority: float, timeout_s: float) -> None:
        """Queue one request and wait for its answer.

        Raises:
            OverloadedError: the queue is full.
            DeadlineExceededError: `timeout_s` ran out, or the policy gave the request up before.
        """
        job = Job(value, tokens, priority)
        if not self._has_room(job):
            raise OverloadedError("the queue is full", retry_after_s=1.0)
        self._waiting[job.level] += tokens
        self._enqueue(job)
        try:
            async with asyncio.timeout(timeout_s):
                await job.answer
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out") from None
        finally:
            job.answer.cancel()
            self._waits_no_longer(job)

    def _has_room(self, job: Job[T]) -> bool:
        return self._waiting.total() + job.tokens <= self._limits.queue_tokens

    def _waits_no_longer(self, job: Job[T]) -> None:
        self._waiting[job.level] -= job.counted_tokens
        job.counted_tokens = 0

    def _enqueue(self, job: Job[T]) -> None:
        raise NotImplementedError

    async def _run(self) -> None:
        raise NotImplementedError

    async def _compute(self, batch: list[tuple[Job[T], int]]) -> None:
        """Run a batch of so many tokens of each job; answer those of which nothing is left to run."""
        for job, _ in batch:
            self._waits_no_longer(job)
        await self._run_batch([(job.value, tokens) for job, tokens in batch])
        for job, _ in batch:
            job.parts -= 1
            if not (job.parts or job.tokens or job.left):
                job.answer.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class ServeBatch(Rival[T]):
    """Ray Serve's `@serve.batch`, read from `ray/serve/batching.py` of Ray 2.60 (the installed one).

    - First come, first served. A window begins when the first request is taken from the queue; the batch closes
      when it is over, when the batch is full, or when the next does not fit (`batch_size_fn` counts tokens).
    - The request that did not fit goes to the back of the queue.
    - Batches are formed whether or not one can run: those that cannot wait for a semaphore, in order, and grow no
      more.
    - A caller that has left is dropped just before its batch runs; until then it takes its place in the batch.

    Setting: a window (`batch_wait_timeout_s`) in which a full batch comes together at full load. With the default
    of 10 ms batches stay small however long the backlog, and with them what the model can do.
    """

    def __init__(self, run_batch: RunBatch[T], limits: RivalLimits) -> None:
        super().__init__(run_batch, limits)
        self._queue: asyncio.Queue[Job[T]] = asyncio.Queue()
        self._arrived = asyncio.Event()
        self._credits = asyncio.Semaphore(limits.max_in_flight)

    def _enqueue(self, job: Job[T]) -> None:
        self._queue.put_nowait(job)
        self._arrived.set()

    async def _run(self) -> None:
        while True:
            self._spawn(self._process(await self._next_batch()))

    async def _next_batch(self) -> list[Job[T]]:
        batch = [await self._queue.get()]
        tokens, most = batch[0].tokens, self._limits.max_batch_tokens
        closes = self._now() + self._limits.fill_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(closes):
                    await self._arrived.wait()
            while not self._queue.empty():
                job = self._queue.get_nowait()
                if tokens + job.tokens > most:
                    self._queue.put_nowait(job)
                    return batch
                batch.append(job)
                tokens += job.tokens
            self._arrived.clear()
            if tokens >= most or self._now() >= closes:
                return batch

    async def _process(self, batch: list[Job[T]]) -> None:
        async with self._credits:
            wanted = [(job, job.take(job.tokens)) for job in batch if not job.left]
            if wanted:
                await self._compute(wanted)


class Triton(Rival[T]):
    """Triton's dynamic batcher, read from `dynamic_batch_scheduler.cc`, `scheduler_utils.cc` and `rate_limiter.cc`
    of triton-inference-server/core at 73aad7c, and from `docs/user_guide/batcher.md` of its server.

    - Priority levels are strict: a request of a higher level passes by all of the lower ones, for as long as there
      are any. Each level is first come, first served.
    - With priority levels nothing is fetched ahead: a batch is formed when an instance is free.
    - Requests join in order until the next would exceed the maximum. If a preferred size was hit exactly on the
      way, and nothing in the batch has waited `max_queue_delay_microseconds`, the largest such part goes. If not,
      a batch that has reached the largest preferred size, to which nothing can be added, or whose delay is over,
      goes as it is. Anything else waits out the delay.
    - A request is rejected when it is reached after its timeout (`allow_timeout_override`, `timeout_action:
      REJECT`). Nothing is rejected because it *will* be late.
    - Queues are bounded by level (`max_queue_size`).

    Setting: half and all of the maximum are preferred; the delay is pimoe's `max_wait_s`; the bound is shared
    equally between three levels.
    """

    LEVELS = 3

    def __init__(self, run_batch: RunBatch[T], limits: RivalLimits) -> None:
        super().__init__(run_batch, limits)
        self._preferred = (limits.max_batch_tokens // 2, limits.max_batch_tokens)
        self._levels: dict[int, collections.deque[Job[T]]] = {}
        self._wake = asyncio.Event()

    def _has_room(self, job: Job[T]) -> bool:
        return self._waiting[job.level] + job.tokens <= self._limits.queue_tokens / self.LEVELS

    def _enqueue(self, job: Job[T]) -> None:
        self._levels.setdefault(job.level, collections.deque()).append(job)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            wake_at = self._dispatch_ready()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(wake_at):
                    await self._wake.wait()
            self._wake.clear()

    def _dispatch_ready(self) -> float | None:
        while self._free:
            batch, wake_at = self._form(self._now())
            if not batch:
                return wake_at
            for job in batch:
                self._levels[job.level].popleft()
            self._free -= 1
            self._spawn(self._process(batch))
        return None

    def _form(self, now: float) -> tuple[list[Job[T]], float | None]:
        """The batch that goes now; or, where there is none, when to look again."""
        batch: list[Job[T]] = []
        tokens = marked = 0
        complete = False
        for job in self._in_order():
            if batch and tokens + job.tokens > self._limits.max_batch_tokens:
                # The largest preferred size is the maximum: what there is gets marked as if it were preferred.
                marked = marked or len(batch)
                complete = True
                break
            batch.append(job)
            tokens += job.tokens
            if tokens in self._preferred:
                marked = len(batch)
        if not batch:
            return [], None
        delay_over_at = min(job.arrival for job in batch) + self._limits.max_wait_s
        if marked and now < delay_over_at:
            return batch[:marked], None
        if complete or tokens >= self._preferred[-1] or now >= delay_over_at:
            return batch, None
        return [], delay_over_at

    def _in_order(self) -> Iterator[Job[T]]:
        """All that wait, most urgent first; what is over is dropped on the way."""
        for level in sorted(self._levels):
            queue = self._levels[level]
            index = 0
            while index < len(queue):
                if queue[index].left:
                    del queue[index]
                    continue
                yield queue[index]
                index += 1

    async def _process(self, batch: list[Job[T]]) -> None:
        await self._compute([(job, job.take(job.tokens)) for job in batch])
        self._free += 1
        self._wake.set()


class _DurationModel:
    """BentoML's `Optimizer`: seconds = a * requests + b by least squares over the last fifty batches, and how long
    the first of a batch waited, on average; both refreshed every five seconds."""

    _KEPT, _SKIPPED, _REFRESH_S = 50, 2, 5.0

    def __init__(self, max_latency_s: float) -> None:
        self.per_request_s = min(2.0, max_latency_s * 2 / 30)
        self.fixed_s = min(1.0, max_latency_s / 30)
        self.wait_s = 0.0
        self._seen = 0
        self._batches: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=self._KEPT)
        self._next_refresh = -math.inf

    def observe(self, requests: int, wait_s: float, seconds: float, now: float) -> None:
        self._seen += 1
        if self._seen <= self._SKIPPED:
            return
        self._batches.append((requests, seconds, wait_s))
        if now >= self._next_refresh:
            self._next_refresh = now + self._REFRESH_S
            self.refresh()

    def refresh(self) -> None:
        if not self._batches:
            return
        requests, seconds, waits = map(list, zip(*self._batches, strict=True))
        fit = np.linalg.lstsq(np.array([[n, 1.0] for n in requests]), np.array(seconds), rcond=None)[0]
        self.per_request_s, self.fixed_s = max(1e-6, float(fit[0])), max(0.0, float(fit[1]))
        self.wait_s = sum(waits) / len(waits)


class BentoML(Rival[T]):
    """BentoML's `CorkDispatcher`, read from `_internal/marshal/dispatcher.py` at 32230a5.

    - One queue, first come, first served; looked at every millisecond while it is not empty.
    - A regression predicts how long a batch of all that waits would take. While the oldest request would not be
      answered within `max_latency_ms` like that, it is dropped, whatever its caller's deadline.
    - With something downstream free, it waits on while the batch has room and `requests * (age of the newest + 1
      ms + seconds per further request)` is no more than 95% of what the first of a batch waited lately.
    - Sizes are rows, the regression counts requests. A request that does not fit whole is split.
    - It learns from the first eleven batches, dropping only what is over; the last two of them wait for company.
    - A caller that has left is computed all the same.

    Setting: `max_latency_ms`, one for all classes, is half of the most urgent one's median timeout; with a longer
    one it keeps requests whose callers leave before they are served. Its default of one batch at a time is raised
    to what the others have.
    """

    _TICK_S = 0.001
    _DECAY = 0.95
    # Batches to learn from, requests beyond which they drop, company to wait for.
    _TRAINING = ((8, 2, 1), (1, 6, 1), (1, 5, 2), (1, 3, 3))

    def __init__(self, run_batch: RunBatch[T], limits: RivalLimits) -> None:
        super().__init__(run_batch, limits)
        self._queue: collections.deque[Job[T]] = collections.deque()
        self._arrived = asyncio.Event()
        self._model = _DurationModel(limits.max_latency_s)

    def _enqueue(self, job: Job[T]) -> None:
        self._queue.append(job)
        self._arrived.set()

    async def _run(self) -> None:
        for step, (batches, enough, company) in enumerate(self._TRAINING):
            await self._train(batches, enough, company)
            if step:
                self._model.refresh()
        while True:
            await self._something_waits()
            self._drop_late()
            if self._free and self._queue and not self._corked():
                self._dispatch(training=False)
            else:
                await asyncio.sleep(self._TICK_S)

    async def _something_waits(self) -> None:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()

    async def _train(self, batches: int, enough: int, company: int) -> None:
        model, latency_s = self._model, self._limits.max_latency_s
        hold_s = min(latency_s * 0.95, (2 * company + 1) * model.per_request_s + model.fixed_s)
        done = 0
        while done < batches:
            await self._something_waits()
            count, waited_s = len(self._queue), self._oldest_s()
            expected_s = company * model.per_request_s + model.fixed_s
            if count > enough - done and waited_s >= latency_s:
                self._drop()
            elif not self._free or (company > 1 and count < company and expected_s + waited_s <= hold_s):
                await asyncio.sleep(self._TICK_S)
            else:
                self._dispatch(training=True)
                done += 1

    def _drop_late(self) -> None:
        latency_s = self._limits.max_latency_s
        while self._queue:
            count, waited_s = len(self._queue), self._oldest_s()
            expected_s = waited_s + self._model.per_request_s * count + self._model.fixed_s
            # A single one has its chance as long as it is not over already, and even then if nothing runs.
            if expected_s < latency_s if count > 1 else self._free or waited_s < latency_s:
                return
            self._drop()

    def _drop(self) -> None:
        job = self._queue.popleft()
        if not job.left:
            job.answer.set_exception(DeadlineExceededError("would not be answered within max_latency_ms"))

    def _corked(self) -> bool:
        count, newest_s = len(self._queue), self._now() - self._queue[-1].arrival
        worth_s = count * (newest_s + self._TICK_S + self._model.per_request_s)
        return count < self._limits.max_batch_tokens and worth_s <= self._model.wait_s * self._DECAY

    def _oldest_s(self) -> float:
        return self._now() - self._queue[0].arrival

    def _dispatch(self, training: bool) -> None:
        batch: list[tuple[Job[T], int]] = []
        room = self._limits.max_batch_tokens
        while self._queue and room:
            job = self._queue[0]
            batch.append((job, job.take(room)))
            room -= batch[-1][1]
            if not job.tokens:
                self._queue.popleft()
        self._free -= 1
        self._spawn(self._process(batch, training))

    async def _process(self, batch: list[tuple[Job[T], int]], training: bool) -> None:
        started = self._now()
        await self._compute(batch)
        waited_s = 0.0 if training else started - batch[0][0].arrival
        self._model.observe(len(batch), waited_s, self._now() - started, self._now())
        self._free += 1
