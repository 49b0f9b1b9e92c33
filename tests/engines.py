"""Engines on small random checkpoints with their experts in this process, for tests of generation and routers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pimoe.runtime.batching import BatchLimits, QueueLimits
from pimoe.runtime.errors import PimoeError
from pimoe.runtime.experts.client import LocalGroup
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.experts.options import ExpertOptions
from pimoe.runtime.generation.engine import Engine
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.loading import Trunk, load_trunk
from pimoe.runtime.requests import FinishReason, GenerateRequest, SamplingParams, TokenChunk, TokenLogprob
from pimoe.runtime.router.limits import RouterLimits
from pimoe.runtime.router.router import Router
from pimoe.runtime.routing.dispatch import Dispatcher
from pimoe.runtime.routing.plan import ExpertRows, contiguous_placement
from torch import Tensor
from waiting import within_patience

# Models this small gain nothing from a second thread, and on a busy machine they lose twentyfold by it.
torch.set_num_threads(1)
# `nothing_left_behind` collects garbage after every test: it need not look through all of torch and transformers.
gc.freeze()


class ControlledGroup:
    """A group in this process that can be held up (`gate`) and made to fail (`failures`, one a call).

    Attributes:
        layers: of all calls, in order.
        waiting: calls that stand at the gate now.
        slow_to_leave: turns of the loop that a cancelled call takes to end.
        hold_when: closes the gate before the first call at which it holds; then it is dropped.
    """

    def __init__(self, group: ExpertGroup) -> None:
        self.local = LocalGroup(group)
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: list[BaseException] = []
        self.layers: list[int] = []
        self.waiting = self.slow_to_leave = 0
        self.hold_when: Callable[[], object] | None = None

    @property
    def computed_s(self) -> float | None:
        return None

    @property
    def replicas(self) -> int:
        return 1

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        self.layers.append(layer)
        if self.hold_when is not None and self.hold_when():
            self.hold_when = None
            self.gate.clear()
        if self.failures:
            raise self.failures.pop(0)
        self.waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            for _ in range(self.slow_to_leave):
                await asyncio.sleep(0)
            raise
        finally:
            self.waiting -= 1
        return await self.local.run(layer, rows, deadline)


@functools.cache
def _trunk(folder: Path, batch_invariant: bool = False) -> Trunk:
    return load_trunk(folder, batch_invariant=batch_invariant)


@functools.cache
def _groups(folder: Path, count: int, batch_invariant: bool) -> list[ExpertGroup]:
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint).experts
    placement = contiguous_placement(spec.num_experts, count)
    return [
        ExpertGroup.load(checkpoint, spec, experts, torch.float32, options=ExpertOptions(batch_invariant))
        for experts in placement.groups
    ]


def controlled_dispatcher(folder: Path, groups: int, batch_invariant: bool = False) -> Dispatcher:
    """A dispatcher to `ControlledGroup`s, its `groups`."""
    held = _groups(folder, groups, batch_invariant)
    return Dispatcher(
        contiguous_placement(sum(len(group.experts) for group in held), groups), [ControlledGroup(g) for g in held]
    )


def controlled(owner: Engine | Router) -> list[Any]:
    """The groups of an engine or router."""
    return list(owner.dispatcher.groups)


def make_engine(
    folder: Path,
    *,
    groups: int = 1,
    clock: Callable[[], float] = time.monotonic,
    queue: QueueLimits | None = None,
    eos: Sequence[int] = (),
    batch_invariant: bool = False,
    **limits: Any,
) -> Engine:
    """An engine that is not started yet; `limits` are fields of `EngineLimits`."""
    trunk = _trunk(folder, batch_invariant)
    assert trunk.decoder is not None
    decoder = trunk.decoder
    if eos:
        decoder = load_trunk(folder).decoder or decoder
        decoder.spec = dataclasses.replace(decoder.spec, eos_token_ids=tuple(eos))
    return Engine(
        decoder,
        controlled_dispatcher(folder, groups, batch_invariant),
        EngineLimits(**{"drain_s": 0.0, **limits}),
        BatchLimits(),
        queue or QueueLimits(),
        clock,
    )


@dataclass
class Answer:
    """Everything that came of a request. `tokens` grows while it runs."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[TokenChunk] = field(default_factory=list)
    reason: FinishReason | None = None
    error: PimoeError | None = None

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of all tokens."""
        return [item for chunk in self.chunks for item in chunk.logprobs or ()]


async def read(chunks: AsyncGenerator[TokenChunk, None], answer: Answer | None = None) -> Answer:
    """Reads a generation to its end; errors of pimoe end up in the answer."""
    answer = answer or Answer()
    try:
        async for chunk in chunks:
            assert answer.reason is None, "a chunk after the last one"
            answer.chunks.append(chunk)
            answer.tokens += chunk.token_ids
            answer.reason = chunk.finish_reason
    except PimoeError as error:
        answer.error = error
    assert (answer.reason is None) == (answer.error is not None), "neither a finish reason nor an error"
    return answer


def request(
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    priority: float = 0.5,
    timeout_s: float = 60.0,
    emitted: Sequence[int] = (),
    tenant: str = "",
    cache_salt: str = "",
    **sampling: Any,
) -> GenerateRequest:
    """A request; greedy unless told otherwise."""
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **sampling})
    return GenerateRequest("r", tuple(prompt), params, priority, timeout_s, tuple(emitted), tenant, cache_salt)


class Clock:
    """Monotonic seconds that pass only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def hold(engine: Engine) -> Any:
    """Stops the engine inside its next step; `gate.set()` of what is returned lets it go on."""
    (group,) = controlled(engine)
    group.gate.clear()
    return group


class Reader:
    """Reads a generation in a task."""

    def __init__(self, engine: Engine, asked: GenerateRequest) -> None:
        self.answer = Answer()
        self.task = asyncio.ensure_future(read(engine.generate(asked), self.answer))

    async def leave(self) -> None:
        """As when a client disconnects."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


def make_router(folder: Path, *, groups: int = 1, limits: RouterLimits | None = None) -> Router:
    """A router that is not started yet, for a decoder or a layer model, with `ControlledGroup`s."""
    trunk = _trunk(folder)
    limits = limits or RouterLimits(engine=EngineLimits(drain_s=0.0))
    return Router(trunk.info, trunk.gates, controlled_dispatcher(folder, groups), trunk.decoder, limits)


def prompt_of(length: int, seed: int = 0, vocab: int = 96) -> tuple[int, ...]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(vocab, (length,), generator=generator).tolist())


_ALONE: dict[tuple[Path, tuple[int, ...], SamplingParams], Answer] = {}


async def alone(folder: Path, asked: GenerateRequest) -> Answer:
    """The request's answer in an engine that nobody else uses, computed once."""
    key = (folder, asked.prompt_token_ids, asked.sampling)
    if key not in _ALONE:
        engine = make_engine(folder)
        engine.start()
        _ALONE[key] = await read(
            engine.generate(dataclasses.replace(asked, timeout_s=60.0, emitted=(), priority=0.5))
        )
        await engine.close()
    return _ALONE[key]


def at_rest(engine: Engine) -> bool:
    """Whether nothing runs, nothing waits, and no block of the cache is held."""
    statistics = engine.statistics()
    quiet = not statistics.running and not statistics.preempted and not statistics.queue.items
    return quiet and not statistics.kv_blocks.held


StartEngine = Callable[..., Engine]


@contextlib.asynccontextmanager
async def started_engines(folder: Path) -> AsyncGenerator[StartEngine, None]:
    """Gives a function that starts engines; all of them are closed afterwards, and must be at rest then."""
    engines: list[Engine] = []

    def start_engine(**options: Any) -> Engine:
        engines.append(make_engine(folder, **options))
        engines[-1].start()
        return engines[-1]

    yield start_engine
    for engine in engines:
        for group in controlled(engine):
            group.gate.set()
        await within_patience(engine.close())
        assert at_rest(engine)
