"""Running the choices of one `/v1` request: start them all, and read them as one stream of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace

from ...runtime.caching import BypassReason
from ...runtime.errors import InvalidRequestError, PimoeError
from ...runtime.generation.stopping import prompt_context, terminators
from ...runtime.requests import GenerateAnswer, GenerateRequest, ModelInfo
from .assembly import Assembler, Piece, TextRules, close, pieces
from .context import GatewayContext, TextCodec
from .lifetime import cancelled_from_behind
from .openai_params import Wanted
from .openai_prompts import token_budget

_PIECES_AHEAD = 64

Pieces = AsyncGenerator[Piece, None]
Events = AsyncGenerator[tuple[int, Piece], None]
Ahead = asyncio.Queue[Piece | Exception]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Requests come prompt by prompt, and within a prompt choice by choice: the order of
    `index`."""

    requests: tuple[GenerateRequest, ...]
    n: int
    bypass: BypassReason | None
    rules: TextRules

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The token ids of each prompt."""
        return tuple(request.prompt_token_ids for request in self.requests[:: self.n])

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True, slots=True)
class TextKind:
    """What kind of text answers are: see `TextRules`."""

    anew: bool = False
    visible: frozenset[int] = frozenset()


def make_plan(
    wanted: Wanted,
    prompts: list[list[int]],
    model: ModelInfo,
    work_id: str,
    remaining_s: float,
    kind: TextKind | None = None,
) -> Plan:
    """The requests that `wanted` makes of the encoded prompts.

    Raises:
        ContextLengthError: a prompt and the tokens asked for exceed the context.
        InvalidRequestError: `min_tokens` is above `max_tokens`.
    """
    requests: list[GenerateRequest] = []
    for prompt in prompts:
        budget = token_budget(len(prompt), wanted.max_tokens, wanted.default_tokens, model)
        if wanted.sampling.min_tokens > budget:
            text = f"min_tokens is {wanted.sampling.min_tokens}; it must be at most max_tokens, here {budget}"
            raise InvalidRequestError(text, "min_tokens")
        base = wanted.base_seed(prompt)
        for choice in range(wanted.n):
            requests.append(
                GenerateRequest(
                    request_id=work_id if not requests else f"{work_id}-{len(requests)}",
                    prompt_token_ids=tuple(prompt),
                    sampling=replace(wanted.sampling, max_tokens=budget, seed=wanted.seed_of(choice, base)),
                    priority=wanted.options.priority,
                    timeout_s=remaining_s,
                    tenant=wanted.options.tenant,
                    cache_salt=wanted.cache_salt,
                )
            )
    return Plan(tuple(requests), wanted.n, wanted.bypass, _rules(wanted, model, kind or TextKind()))


def _rules(wanted: Wanted, model: ModelInfo, kind: TextKind) -> TextRules:
    sampling = wanted.sampling
    return TextRules(
        stop=sampling.stop,
        min_tokens=sampling.min_tokens,
        terminators=terminators(model, sampling),
        ends=frozenset(() if sampling.ignore_eos else model.eos_token_ids),
        logprobs=sampling.logprobs is not None,
        with_stop=wanted.shown.stop,
        visible=kind.visible,
        anew=kind.anew,
    )


@asynccontextmanager
async def started(context: GatewayContext, plan: Plan) -> AsyncGenerator[list[GenerateAnswer], None]:
    """`async with started(...) as answers:` runs every request, and leaves none running behind it."""
    answers = await _start(context, plan)
    try:
        yield answers
    finally:
        for answer in answers:
            await close(answer.chunks)


async def _start(context: GatewayContext, plan: Plan) -> list[GenerateAnswer]:
    if len(plan.requests) == 1:
        return [await context.generate(plan.requests[0], plan.bypass)]
    tasks = [asyncio.create_task(context.generate(request, plan.bypass)) for request in plan.requests]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        # One was refused, or the client left: those that did start must not run on unread.
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, GenerateAnswer):
                await close(outcome.chunks)
        raise


def streams(answers: list[GenerateAnswer], codec: TextCodec | None, plan: Plan) -> list[Pieces]:
    """Each answer as pieces of text."""
    texts: list[Pieces] = []
    for answer, request in zip(answers, plan.requests, strict=True):
        context = tuple(prompt_context(request.prompt_token_ids))
        texts.append(pieces(answer.chunks, Assembler(codec, plan.rules, context)))
    return texts


async def interleave(choices: list[Pieces]) -> Events:
    """The pieces of all choices, each with the index of its own: one of each in turn, and not as they happen to
    come, so that equal answers give equal streams, computed or from the cache.

    The first error of any choice ends them all; closing this closes them all.
    """
    if len(choices) == 1:
        async with aclosing(choices[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    # Bounded, so that a slow reader slows the generations down instead of filling memory.
    queues: list[Ahead] = [asyncio.Queue(maxsize=_PIECES_AHEAD) for _ in choices]
    pumps = [asyncio.create_task(_pump(choice, index, queues)) for index, choice in enumerate(choices)]
    try:
        running = list(range(len(choices)))
        while running:
            for index in tuple(running):
                item = await queues[index].get()
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason is not None:
                    running.remove(index)
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(choice: Pieces, index: int, queues: list[Ahead]) -> None:
    failure: Exception
    try:
        async with aclosing(choice):
            async for piece in choice:
                await queues[index].put(piece)
        return
    except asyncio.CancelledError:
        if not cancelled_from_behind():
            raise
        failure = PimoeError("a generation was cancelled")
    except Exception as error:
        failure = error
    for queue in queues:  # the one that is waited for is empty, and has room for the news
        with suppress(asyncio.QueueFull):
            queue.put_nowait(failure)
    await queues[index].put(failure)
