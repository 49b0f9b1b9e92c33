"""Where the time of a decoding step goes, layer by layer: a router's parts with a clock around each.

From outside: methods of one router's decoder, dispatcher and engine are replaced for as long as it is measured.
Each costs some microseconds more then, so speed is to be measured at another time. Steps run as one batch
meanwhile: the parts of two micro-batches overlap.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

from pimoe.runtime.generation.step_runner import StepRunner
from pimoe.runtime.router.router import Router
from pimoe.runtime.routing import dispatch as dispatch_module
from pimoe.runtime.routing.dispatch import Dispatched, Dispatcher


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step, all layers together.

    Attributes:
        tokens: computed in it.
        attention: with both norms and the residual.
        gate: choosing experts.
        plan: cutting the routing into one piece per group, and counting.
        link: gathering rows, sending and waiting for groups, beyond the computing of the slowest one; over lanes
            with the plan and the sum of the groups, which are one call with it.
        expert: computing of the slowest group of each layer; in this process, of all of them.
        combine: adding up what the groups answered, and the residual.
        other: scheduling, embedding, logits, sampling, handing out.
    """

    tokens: int
    attention: float
    gate: float
    plan: float
    link: float
    expert: float
    combine: float
    other: float


PARTS = tuple(field.name for field in fields(StepTimes) if field.name != "tokens")


class _Recorder:
    def __init__(self) -> None:
        self.steps: list[StepTimes] = []
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._tokens: list[int] = []

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._spent[part] += time.perf_counter() - started

        return wrapped

    def forward(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapped(items: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self._tokens.append(sum(item.count for item in items))
            return await call(items, *args, **kwargs)

        return wrapped

    def dispatch(self, dispatcher: Dispatcher) -> Callable[..., Awaitable[Dispatched]]:
        call = dispatcher.run_counted

        async def wrapped(*args: Any, **kwargs: Any) -> Dispatched:
            before = dispatcher.computed_s()
            local_s, combine_s = self._spent["local"], self._spent["combine"]
            started = time.perf_counter()
            done = await call(*args, **kwargs)
            total_s = time.perf_counter() - started
            told = [now - then for now, then in zip(dispatcher.computed_s(), before, strict=True)]
            expert_s = self._spent["local"] - local_s + max(told, default=0.0)
            self._spent["expert"] += expert_s
            self._spent["link"] += max(0.0, done.waited_s - expert_s)
            self._spent["plan"] += total_s - done.waited_s - (self._spent["combine"] - combine_s)
            return done

        return wrapped

    def local_group(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapped(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return await call(*args)
            finally:
                self._spent["local"] += time.perf_counter() - started

        return wrapped

    def step(self, call: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        async def wrapped() -> None:
            self._spent.clear()
            self._tokens.clear()
            started = time.perf_counter()
            await call()
            total_s = time.perf_counter() - started
            if self._tokens:
                parts = [self._spent[part] for part in PARTS[:-1]]
                self.steps.append(StepTimes(sum(self._tokens), *parts, max(0.0, total_s - sum(parts))))

        return wrapped


@contextmanager
def split(router: Router) -> Iterator[list[StepTimes]]:
    """Record the steps of `router`, which has an engine, in the list. Only one router at a time."""
    decoder, dispatcher, engine = router.decoder, router.dispatcher, router.engine
    assert decoder is not None
    assert engine is not None
    runner: StepRunner = engine.runner
    clock = _Recorder()
    replaced: list[tuple[Any, str, Any]] = [
        (decoder, "_attend", clock.timed("attention", decoder._attend)),
        (decoder, "_route", clock.timed("gate", decoder._route)),
        (decoder, "_combine", clock.timed("combine", decoder._combine)),
        (dispatch_module, "combine", clock.timed("combine", dispatch_module.combine)),
        (dispatcher, "run_counted", clock.dispatch(dispatcher)),
        (runner, "_forward", clock.forward(runner._forward)),
        (engine, "step", clock.step(engine.step)),
        (runner.micro_batches, "policy", "never"),
    ]
    local = [group for group in dispatcher.groups if group.computed_s is None]
    replaced += [(group, "run", clock.local_group(group.run)) for group in local]
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(patch.object(owner, name, replacement))
        yield clock.steps
