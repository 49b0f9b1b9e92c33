"""Running the choices of one `/v1` request: start them all, and read them as one stream of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace

from ...runtime.caching import BypassReason
from ...runtime.errors import InvalidRequestError, PimoeError
from ...runtime.requests import GenerateAnswer, GenerateRequest, ModelInfo
from .assembly import Assembler, Piece, TextRules, close, pieces
from .context import GatewayContext, TextCodec
from .lifetime import cancelled_from_behind
from .openai_params import Wanted
from .openai_prompts import token_budget

# More than any character or word that the end of a prompt may be in the middle of.
_CONTEXT_TOKENS = 32
_PIECES_AHEAD = 64

Pieces = AsyncGenerator[Piece, None]
Events = AsyncGenerator[tuple[int, Piece], None]
Ahead = asyncio.Queue[Piece | Exception]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Requests come prompt by prompt, and within a prompt choice by choice: the order of
    `index`."""

    requests: tuple[GenerateRequest, ...]
    prompt_tokens: int
    bypass: BypassReason | None
    rules: TextRules


def make_plan(
    wanted: Wanted, prompts: list[list[int]], model: ModelInfo, work_id: str, remaining_s: float
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
            sampling = replace(wanted.sampling, max_tokens=budget, seed=wanted.seed_of(choice, base))
            name = work_id if not requests else f"{work_id}-{len(requests)}"
            priority, tenant = wanted.options.priority, wanted.options.tenant
            requests.append(GenerateRequest(name, tuple(prompt), sampling, priority, remaining_s, tenant=tenant))
    return Plan(
        requests=tuple(requests),
        prompt_tokens=sum(map(len, prompts)),
        bypass=wanted.bypass,
        rules=_rules(wanted, model),
    )


def _rules(wanted: Wanted, model: ModelInfo) -> TextRules:
    ends = () if wanted.sampling.ignore_eos else model.eos_token_ids
    return TextRules(
        stop=wanted.stop,
        min_tokens=wanted.sampling.min_tokens,
        terminators=frozenset((*ends, *wanted.sampling.stop_token_ids)),
        logprobs=wanted.sampling.logprobs is not None,
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


def streams(
    answers: list[GenerateAnswer], codec: TextCodec | None, plan: Plan, continues: bool = False
) -> list[Pieces]:
    """Each answer as pieces of text. `continues`: of a text that goes on where its prompt ends, in the middle
    of a line or a word, rather than of one that begins anew."""
    texts: list[Pieces] = []
    for answer, request in zip(answers, plan.requests, strict=True):
        context = request.prompt_token_ids[-_CONTEXT_TOKENS:] if continues else ()
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
