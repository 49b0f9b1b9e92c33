"""Replays arrivals against a batching policy in virtual time; nothing waits for a real clock.

pimoe's policy is the `Batcher` itself, on an event loop whose clock jumps from one event to the next; so are the
others, of `batching_rivals.py`. What they dispatch is computed by a `Model` of experts behind a network.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from arrivals import Arrival
from batching_rivals import BentoML, RivalLimits, ServeBatch, Triton
from pimoe.runtime.batching import Batcher, BatchLimits, Computed, QueueLimits
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError

T = TypeVar("T")

OURS = "pimoe"
POLICIES = (OURS, "@serve.batch", "Triton", "BentoML")

# Virtual time --------------------------------------------------------------------------------------------------


class _JumpingSelector(selectors.SelectSelector):
    """Lets the clock jump instead of waiting. A turn of the loop takes a nanosecond, so that what is due a
    rounding error later is not asked for again and again at the same instant."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing is left to happen")
        self.now_s += max(0.0, timeout) + 1e-9
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, without I/O: nobody ever waits for real."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.now_s


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """What `asyncio.run` does, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


# What is served ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What runs batches, one after the other, as experts do. A batch keeps them busy for

        fixed_s + per_token_s * tokens + per_row_s * rows of the most loaded expert

    times a lognormal of `noise`.

    Attributes:
        transport_s: a batch's way there and back, while others run.
        skew, spread: popularity of the n-th expert is 1 / n ** skew, times what each batch draws from a lognormal.
    """

    transport_s: float = 0.004
    fixed_s: float = 0.01
    per_token_s: float = 2.5e-5
    per_row_s: float = 1.2e-4
    experts: int = 8
    top_k: int = 2
    skew: float = 0.5
    spread: float = 0.3
    noise: float = 0.05

    def largest_rows(self, tokens: int, chance: random.Random) -> int:
        """Rows of the most loaded expert of one batch; no token goes to the same expert twice."""
        weights = [chance.lognormvariate(0.0, self.spread) / n**self.skew for n in range(1, self.experts + 1)]
        share: float = min(1.0, self.top_k * max(weights) / sum(weights))
        return max(1, round(tokens * share))

    def seconds(self, tokens: int, rows: int, chance: random.Random) -> float:
        """How long one batch keeps the experts busy."""
        mean_s = self.fixed_s + self.per_token_s * tokens + self.per_row_s * rows
        return mean_s * chance.lognormvariate(-self.noise * self.noise / 2, self.noise)

    def expected_s(self, tokens: int) -> float:
        """How long such batches keep them busy on average."""
        chance, draws = random.Random(0), 500
        rows = sum(self.largest_rows(tokens, chance) for _ in range(draws)) / draws
        return self.fixed_s + self.per_token_s * tokens + self.per_row_s * rows


@dataclass(frozen=True)
class Service:
    """A model and pimoe's limits around it: as they are by default, but for the sizes, which are an eighth."""

    model: Model = field(default_factory=Model)
    batching: BatchLimits = field(default_factory=lambda: BatchLimits(max_batch_tokens=512))
    queue: QueueLimits = field(default_factory=lambda: QueueLimits(max_tokens=64 * 512))

    @cached_property
    def full_batch_s(self) -> float:
        """How long a full batch takes on average."""
        return self.model.expected_s(self.batching.max_batch_tokens)

    @property
    def capacity_tokens_per_s(self) -> float:
        """With full batches, one right after the other."""
        return self.batching.max_batch_tokens / self.full_batch_s


Outcome = Literal["in time", "late", "expired", "refused"]


@dataclass(slots=True)
class Request:
    """One arrival and what became of it.

    Attributes:
        left_s: when it left the queue: dispatched or given up.
        began_s: when (the last of) it began to be computed; infinite if it never was.
    """

    arrival: Arrival
    left_s: float = math.inf
    began_s: float = math.inf
    outcome: Outcome | None = None


class Batch(NamedTuple):
    """A batch that was run; `newest_s` is when the newest of its requests arrived."""

    dispatched_s: float
    tokens: int
    seconds: float
    newest_s: float


class Replay:
    """One policy, one trace: what runs the batches, and writes down what happens."""

    def __init__(self, model: Model, seed: int) -> None:
        self._model = model
        self._chance = random.Random(seed)
        self._experts = asyncio.Lock()
        self.requests: list[Request] = []
        self.batches: list[Batch] = []
        self.busy_until_s = 0.0

    async def run_batch(self, parts: Sequence[tuple[Request, int]]) -> int:
        """Compute so many tokens of each request; the rows of the most loaded expert."""
        loop = asyncio.get_running_loop()
        dispatched_s = loop.time()
        tokens = sum(tokens for _, tokens in parts)
        rows = self._model.largest_rows(tokens, self._chance)
        seconds = self._model.seconds(tokens, rows, self._chance)
        newest_s = max(request.arrival.time_s for request, _ in parts)
        self.batches.append(Batch(dispatched_s, tokens, seconds, newest_s))
        for request, _ in parts:
            request.left_s = dispatched_s
        await asyncio.sleep(self._model.transport_s / 2)
        async with self._experts:
            for request, _ in parts:
                request.began_s = loop.time()
            await asyncio.sleep(seconds)
            self.busy_until_s = loop.time()
        await asyncio.sleep(self._model.transport_s / 2)
        return rows

    async def play(self, policy: Policy, arrivals: Iterable[Arrival]) -> None:
        """Submit everything when it arrives, and wait until all of it has an outcome."""
        policy.start()
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as callers:
            for arrival in arrivals:
                await asyncio.sleep(arrival.time_s - loop.time())
                self.requests.append(Request(arrival))
                callers.create_task(self._call(policy, self.requests[-1]))
        await policy.close()

    async def _call(self, policy: Policy, request: Request) -> None:
        wanted = request.arrival
        try:
            await policy.submit(request, wanted.tokens, wanted.priority, wanted.timeout_s)
            request.outcome = "in time"
        except OverloadedError:
            request.outcome = "refused"
        except DeadlineExceededError:
            request.outcome = "late" if math.isfinite(request.left_s) else "expired"
        request.left_s = min(request.left_s, asyncio.get_running_loop().time())


class Policy(Protocol):
    """What takes requests and runs batches."""

    def start(self) -> None: ...

    async def submit(self, value: Request, tokens: int, priority: float, timeout_s: float) -> object: ...

    async def close(self) -> None: ...


RunBatch = Callable[[Sequence[tuple[Request, int]]], Awaitable[int]]


def make_policy(name: str, service: Service, max_latency_s: float, run_batch: RunBatch) -> Policy:
    """A policy of `POLICIES`, to be made on the loop on which it runs; `max_latency_s` see `RivalLimits`."""
    if name == OURS:

        async def execute(requests: Sequence[Request], deadline: float) -> Computed[None]:
            rows = await run_batch([(request, request.arrival.tokens) for request in requests])
            return Computed([None] * len(requests), rows)

        clock = asyncio.get_running_loop().time
        return Batcher(execute, service.batching, service.queue, clock, servers=lambda: 1)
    limits = RivalLimits(
        max_batch_tokens=service.batching.max_batch_tokens,
        max_in_flight=service.batching.max_in_flight,
        queue_tokens=service.queue.max_tokens,
        max_wait_s=service.batching.max_wait_s,
        fill_s=service.full_batch_s,
        max_latency_s=max_latency_s,
    )
    rivals: dict[str, Callable[[], Policy]] = {
        "@serve.batch": lambda: ServeBatch(run_batch, limits),
        "Triton": lambda: Triton(run_batch, limits),
        "BentoML": lambda: BentoML(run_batch, limits),
    }
    return rivals[name]()


def replay(policy: str, service: Service, arrivals: Sequence[Arrival], seed: int = 0) -> Replay:
    """Replay a trace against a policy."""

    most_urgent = max(arrival.priority for arrival in arrivals)
    max_latency_s = median(arrival.timeout_s for arrival in arrivals if arrival.priority == most_urgent) / 2

    async def play() -> Replay:
        made = Replay(service.model, seed)
        await made.play(make_policy(policy, service, max_latency_s, made.run_batch), arrivals)
        return made

    return run_virtually(play())
