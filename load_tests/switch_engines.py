"""Engines with different switches over the same weights and group processes, and requests for them.

The router side of `engine_switches.py`: a runtime loads a model once, and each engine that is compared is another
`Router` over its decoder and its links. What differs between two of them is the switch, and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pimoe.runtime.generation.engine_statistics import EngineStatistics
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.requests import GenerateRequest, SamplingParams, TokenChunk, TokenLogprob
from pimoe.runtime.router.limits import RouterLimits
from pimoe.runtime.router.router import Router
from pimoe.runtime.routing.dispatch import Dispatcher, GroupBackend
from pimoe.runtime.routing.plan import ExpertRows
from torch import Tensor

GROUPS = 2
_TIMEOUT_S = 600.0
_ids = itertools.count()

Prompt = list[int]


class DelayedGroup:
    """A group behind a slow link: every dispatch takes so much longer, and nobody computes meanwhile."""

    def __init__(self, group: GroupBackend, delay_s: float) -> None:
        self._group, self._delay_s = group, delay_s

    @property
    def replicas(self) -> int:
        """See `GroupBackend`."""
        return self._group.replicas

    @property
    def computed_s(self) -> float | None:
        """See `GroupBackend`."""
        return self._group.computed_s

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        await asyncio.sleep(self._delay_s)
        return await self._group.run(layer, rows, deadline)


class ElsewhereGroup:
    """A group on a machine of its own, simulated: it answers zeros, after `delay_s` for the link and `row_s` for
    each row, one dispatch after the other, and takes nothing of this machine's cores."""

    replicas = 1

    def __init__(self, delay_s: float, row_s: float) -> None:
        self._delay_s, self._row_s = delay_s, row_s
        self._computed_s = self._free_at = 0.0

    @property
    def computed_s(self) -> float | None:
        """See `GroupBackend`."""
        return self._computed_s

    async def run(self, layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        """See `GroupBackend`."""
        # By the clock, not by sleeping twice: it computes on while this loop is busy.
        now, seconds = time.monotonic(), self._row_s * len(rows.hidden)
        self._free_at = max(now + self._delay_s, self._free_at) + seconds
        self._computed_s += seconds
        await asyncio.sleep(self._free_at - now)
        return torch.zeros(rows.hidden.shape)


Wrap = Callable[[GroupBackend], GroupBackend]
"""What an engine has in place of a runtime's group."""


async def start_runtime(folder: Path, dtype: str, batch_invariant: bool) -> LocalRuntime:
    """The model in this process, its experts in two others. Its own engine is not used, and so kept small."""
    limits = RouterLimits(engine=EngineLimits(max_sequences=1, kv_blocks=1))
    return await LocalRuntime.start(
        folder, GROUPS, "processes", dtype=dtype, batch_invariant=batch_invariant, limits=limits
    )


@asynccontextmanager
async def opened(runtime: LocalRuntime, limits: EngineLimits, wrap: Wrap | None = None) -> AsyncIterator[Engine]:
    """An engine with `limits` over a runtime's decoder and groups, or over what `wrap` makes of these."""
    base = runtime.router
    groups = [group if wrap is None else wrap(group) for group in base.dispatcher.groups]
    dispatcher = Dispatcher(base.dispatcher.placement, groups)
    router = Router(base.model, base.gates, dispatcher, base.decoder, RouterLimits(engine=limits))
    router.start()
    try:
        yield Engine(router)
    finally:
        await router.close()


@dataclass
class Answer:
    """What one request got. Times are on `time.monotonic()`.

    Attributes:
        at: when each token came.
        begun: set with the first one.
        wanted_more: whether to go on reading; who sets it to false ends the request.
    """

    asked: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    wanted_more: bool = True

    @property
    def first_token_s(self) -> float:
        """From asking to the first token."""
        return self.at[0] - self.asked

    def note(self, chunk: TokenChunk) -> None:
        """The next tokens."""
        now = time.monotonic()
        self.tokens += chunk.token_ids
        self.logprobs += chunk.logprobs or ()
        self.at += [now] * len(chunk.token_ids)
        self.begun.set()


class Engine:
    """A router that generates greedily, past the end of the text."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def statistics(self) -> EngineStatistics:
        """Since it was opened."""
        assert self._router.engine is not None
        return self._router.engine.statistics()

    async def read(self, answer: Answer, prompt: Prompt, max_tokens: int, logprobs: int | None = None) -> Answer:
        """Generate into `answer`, until it is complete or wants no more."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs)
        request = GenerateRequest(str(next(_ids)), tuple(prompt), sampling, timeout_s=_TIMEOUT_S)
        chunks: AsyncGenerator[TokenChunk, None] = self._router.generate(request)
        async with aclosing(chunks):
            async for chunk in chunks:
                answer.note(chunk)
                if not answer.wanted_more:
                    break
        return answer

    async def ask(self, prompts: Sequence[Prompt], max_tokens: int, logprobs: int | None = None) -> list[Answer]:
        """All of them at once."""
        calls = [self.read(Answer(time.monotonic()), prompt, max_tokens, logprobs) for prompt in prompts]
        return await asyncio.gather(*calls)


def random_prompts(vocab_size: int, count: int, tokens: int, seed: int) -> list[Prompt]:
    """The same ones for the same seed."""
    generator = np.random.default_rng(seed)
    found: list[Prompt] = generator.integers(vocab_size, size=(count, tokens)).tolist()
    return found


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens/s while all of them decode: from when the last one begins until the first one ends."""
    begin = max(answer.at[0] for answer in answers)
    end = min(answer.at[-1] for answer in answers)
    return sum(begin < at <= end for answer in answers for at in answer.at) / (end - begin)


def prefill_rate(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> float:
    """Tokens/s of prompts, until the last of them has its first token."""
    taken_s = max(answer.at[0] for answer in answers) - min(answer.asked for answer in answers)
    return sum(map(len, prompts)) / taken_s
