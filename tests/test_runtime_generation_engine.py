"""The engine: what a request gets does not depend on who else is there, and whatever happens to one of them.

The tokens to expect are those that the same request gets in an engine of its own; that these are right is the
business of `test_runtime_local`, against transformers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from engines import (
    Answer,
    Clock,
    Reader,
    StartEngine,
    alone,
    at_rest,
    controlled,
    hold,
    make_engine,
    prompt_of,
    read,
    request,
    started_engines,
)
from hypothesis import given, settings, target
from hypothesis import strategies as st
from pimoe.runtime.batching import QueueLimits
from pimoe.runtime.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    PimoeError,
    RequestCancelledError,
    UnavailableError,
)
from pimoe.runtime.generation.engine import Engine
from pimoe.runtime.requests import GenerateRequest
from waiting import eventually, nothing_left_behind, within_patience  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

RAGGED = [prompt_of(length, seed) for seed, length in enumerate([3, 17, 1, 40, 8, 25])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[StartEngine]:
    async with started_engines(folder) as start_engine:
        yield start_engine


# Alone and among others.


@pytest.mark.parametrize(
    "options",
    [{}, {"max_step_tokens": 5}, {"max_sequences": 2}, {"kv_blocks": 12}, {"groups": 3}],
    ids=["all at once", "prompts in chunks", "two at a time", "little memory", "three groups"],
)
async def test_64_greedy_tokens_are_the_same_alone_and_among_others(
    folder: Path, start: StartEngine, options: dict[str, Any]
) -> None:
    requests = [request(prompt, 64) for prompt in RAGGED]
    expected = [await alone(folder, asked) for asked in requests]
    engine = start(**options)
    answers = await asyncio.gather(*(read(engine.generate(asked)) for asked in requests))
    for answer, reference in zip(answers, expected, strict=True):
        assert len(answer.tokens) == 64
        assert answer.tokens == reference.tokens
        assert answer.reason == "length"
    assert len({tuple(answer.tokens) for answer in answers}) == len(RAGGED), "the model says the same to everyone"


async def test_drawn_tokens_are_the_same_alone_and_among_others(folder: Path, start: StartEngine) -> None:
    requests = [
        request(prompt, 24, temperature=0.5 + seed / 4, seed=seed, top_p=0.95 if seed % 2 else 1.0, logprobs=2)
        for seed, prompt in enumerate(RAGGED)
    ]
    expected = [await alone(folder, asked) for asked in requests]
    engine = start(max_step_tokens=7)
    answers = await asyncio.gather(*(read(engine.generate(asked)) for asked in requests))
    for answer, reference in zip(answers, expected, strict=True):
        assert answer.tokens == reference.tokens
        assert [item.token_id for item in answer.logprobs] == answer.tokens
        mine, theirs = ([item.logprob for item in a.logprobs] for a in (answer, reference))
        assert mine == pytest.approx(theirs, abs=1e-4)
        assert all(len(item.top) == 2 for item in answer.logprobs)


async def test_a_long_prompt_does_not_stall_who_decodes(start: StartEngine) -> None:
    engine = start(max_step_tokens=4)
    first = Reader(engine, request(prompt_of(4), 60))
    await eventually(lambda: first.answer.tokens)
    steps, decoded = engine.statistics().steps, len(first.answer.tokens)
    second = Reader(engine, request(prompt_of(40), 2))
    await eventually(lambda: second.answer.tokens)
    steps, decoded = engine.statistics().steps - steps, len(first.answer.tokens) - decoded
    assert steps >= 10, "40 tokens at 4 a step"
    assert decoded >= 9, "who decodes got a token in every one of them"
    await asyncio.gather(first.task, second.task)


async def test_prompts_are_counted_as_prefill_and_tokens_as_decode(start: StartEngine) -> None:
    engine = start()
    await asyncio.gather(*(read(engine.generate(request(prompt_of(n), 6))) for n in (5, 9)))
    statistics = engine.statistics()
    assert statistics.prefill_tokens == 14
    assert statistics.decode_tokens == 2 * 5
    assert statistics.steps == 6
    assert statistics.step_s > 0
    blocks = statistics.kv_blocks
    assert (blocks.held, blocks.kept) == (0, 0), "no block was filled"
    assert blocks.free == blocks.total == engine.cache.num_blocks


async def test_no_more_run_at_once_than_there_are_slots(start: StartEngine) -> None:
    engine = start(max_sequences=2)
    running = []

    async def watch(asked: GenerateRequest) -> None:
        async for _ in engine.generate(asked):
            running.append(engine.statistics().running)

    await asyncio.gather(*(watch(request(prompt, 5)) for prompt in RAGGED))
    assert len(running) == 30
    assert max(running) == 2


async def test_no_more_blocks_are_used_than_there_are(start: StartEngine) -> None:
    engine = start(kv_blocks=8, block_tokens=4)
    held = []

    async def watch(asked: GenerateRequest) -> None:
        async for _ in engine.generate(asked):
            held.append(engine.statistics().kv_blocks.held)

    await asyncio.gather(*(watch(request(prompt_of(n), 8)) for n in (20, 4, 3, 12, 2)))
    assert len(held) == 40
    assert 5 < max(held) <= 8
    assert engine.statistics().preemptions


# Where a generation ends.


async def test_an_end_token_ends_it(folder: Path, start: StartEngine) -> None:
    free = await alone(folder, request(RAGGED[0], 20))
    eos = free.tokens[7]
    cut = free.tokens[: free.tokens.index(eos) + 1]
    answer = await read(start(eos=[eos]).generate(request(RAGGED[0], 20)))
    assert (answer.tokens, answer.reason) == (cut, "stop")
    ignoring = await read(start(eos=[eos]).generate(request(RAGGED[0], 20, ignore_eos=True)))
    assert (ignoring.tokens, ignoring.reason) == (free.tokens, "length")


async def test_stop_tokens_end_it_also_where_end_tokens_are_ignored(folder: Path, start: StartEngine) -> None:
    free = await alone(folder, request(RAGGED[1], 20))
    stop = free.tokens[5]
    cut = free.tokens[: free.tokens.index(stop) + 1]
    asked = request(RAGGED[1], 20, stop_token_ids=(stop,), ignore_eos=True)
    answer = await read(start().generate(asked))
    assert (answer.tokens, answer.reason) == (cut, "stop")


async def test_nothing_ends_it_before_min_tokens(folder: Path, start: StartEngine) -> None:
    free = await alone(folder, request(RAGGED[0], 20))
    eos, stop = free.tokens[0], free.tokens[1]
    engine = start(eos=[eos, 5_000])  # an end token that the vocabulary lacks must do no harm
    answer = await read(engine.generate(request(RAGGED[0], 20, min_tokens=6, stop_token_ids=(stop,))))
    assert len(answer.tokens) >= 6
    assert not {eos, stop} & set(answer.tokens[:6])
    short = await read(engine.generate(request(RAGGED[0], 20)))
    assert (short.tokens, short.reason) == ([eos], "stop")


async def test_the_last_token_may_be_both_last_and_stop(folder: Path, start: StartEngine) -> None:
    free = await alone(folder, request(RAGGED[0], 1))
    answer = await read(start().generate(request(RAGGED[0], 1, stop_token_ids=tuple(free.tokens))))
    assert (answer.tokens, answer.reason) == (free.tokens, "stop")


# Resuming.


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 11, "top_k": 30}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("step_tokens", [2048, 6])
async def test_a_resumed_generation_goes_on_with_the_tokens_it_would_have_had(
    folder: Path, start: StartEngine, sampling: dict[str, Any], step_tokens: int
) -> None:
    whole = await alone(folder, request(RAGGED[1], 16, **sampling))
    engine = start(max_step_tokens=step_tokens)
    for cut in (1, 2, 9, 15):
        asked = request(RAGGED[1], 16, emitted=whole.tokens[:cut], **sampling)
        rest = await read(engine.generate(asked))
        assert (rest.tokens, rest.reason) == (whole.tokens[cut:], "length")


async def test_when_only_the_end_was_lost_resuming_gives_just_that(folder: Path, start: StartEngine) -> None:
    whole = await alone(folder, request(RAGGED[0], 5))
    engine = start(eos=[90])
    lost = await read(engine.generate(request(RAGGED[0], 5, emitted=whole.tokens)))
    assert (lost.tokens, lost.reason) == ([], "length")
    stopped = await read(engine.generate(request(RAGGED[0], 5, emitted=[4, 90])))
    assert (stopped.tokens, stopped.reason) == ([], "stop")
    assert engine.statistics().steps == 0


# Requests that can never run.


@pytest.mark.parametrize(
    ("asked", "error", "param"),
    [
        (request((), 5), InvalidRequestError, None),
        (request((1,), 0), InvalidRequestError, None),
        (request((1, 96), 5), InvalidRequestError, "prompt"),
        (request((-1,), 5), InvalidRequestError, "prompt"),
        (request((1,), 5, stop_token_ids=(96,)), InvalidRequestError, "stop_token_ids"),
        (request((1,), 5, stop_token_ids=(3, -2)), InvalidRequestError, "stop_token_ids"),
        (request((1,), 5, emitted=(1, 400)), InvalidRequestError, "emitted"),
        (request((1,), 2, emitted=(1, 2, 3)), InvalidRequestError, "emitted"),
        (request(prompt_of(200), 57), ContextLengthError, "max_tokens"),
        (request(prompt_of(257), 1), ContextLengthError, "max_tokens"),
    ],
)
async def test_what_can_never_run_is_refused_at_once(
    start: StartEngine, asked: GenerateRequest, error: type[PimoeError], param: str | None
) -> None:
    engine = start()
    with pytest.raises(error) as caught:
        await anext(engine.generate(asked))
    assert type(caught.value) is error
    assert caught.value.param == param
    assert engine.statistics().steps == 0
    assert len((await read(engine.generate(request(prompt_of(250), 6)))).tokens) == 6, "the context can be filled"


@pytest.mark.parametrize("limits", [{"max_context_tokens": 20}, {"kv_blocks": 5, "block_tokens": 4}])
async def test_limits_shorten_the_context(start: StartEngine, limits: dict[str, int]) -> None:
    engine = start(**limits)
    assert engine.max_context_tokens == 20
    assert (await read(engine.generate(request(prompt_of(15), 5)))).reason == "length"
    with pytest.raises(ContextLengthError, match="15 tokens and max_tokens 6 exceed the context of 20"):
        await anext(engine.generate(request(prompt_of(15), 6)))


async def test_a_limit_cannot_lengthen_the_context(start: StartEngine) -> None:
    assert start(max_context_tokens=10_000).max_context_tokens == 256


# Leaving.


async def test_leaving_while_waiting_frees_the_place_in_the_queue(folder: Path, start: StartEngine) -> None:
    engine = start(max_sequences=1)
    group = hold(engine)
    first = Reader(engine, request(RAGGED[0], 6))
    await eventually(lambda: group.waiting)
    second = Reader(engine, request(RAGGED[1], 6))
    await eventually(lambda: engine.statistics().queue.items == 1)
    await second.leave()
    assert engine.statistics().queue[:2] == (0, 0)
    assert engine.statistics().queue.cancelled == 1
    group.gate.set()
    assert (await first.task).tokens == (await alone(folder, request(RAGGED[0], 6))).tokens


async def test_leaving_while_running_frees_the_slot_and_disturbs_nobody(folder: Path, start: StartEngine) -> None:
    engine = start(max_sequences=2)
    staying = Reader(engine, request(RAGGED[0], 40))
    leaving = Reader(engine, request(RAGGED[3], 40))
    await eventually(lambda: len(leaving.answer.tokens) > 3)
    await leaving.leave()
    third = Reader(engine, request(RAGGED[4], 10))
    assert (await third.task).tokens == (await alone(folder, request(RAGGED[4], 10))).tokens
    assert (await staying.task).tokens == (await alone(folder, request(RAGGED[0], 40))).tokens
    await eventually(lambda: at_rest(engine))


async def test_a_slot_is_not_reused_while_a_step_computes_with_it(folder: Path, start: StartEngine) -> None:
    engine = start(max_sequences=2)
    group = hold(engine)
    staying, leaving = Reader(engine, request(RAGGED[0], 6)), Reader(engine, request(RAGGED[3], 6))
    await eventually(lambda: group.waiting and engine.statistics().running == 2)
    await leaving.leave()
    newcomer = Reader(engine, request(RAGGED[4], 6))
    await eventually(lambda: engine.statistics().queue.items == 1)
    assert engine.statistics().running == 2
    group.gate.set()
    for reader, prompt in ((staying, RAGGED[0]), (newcomer, RAGGED[4])):
        assert (await reader.task).tokens == (await alone(folder, request(prompt, 6))).tokens


async def test_a_step_that_nobody_waits_for_is_given_up(folder: Path, start: StartEngine) -> None:
    engine = start(max_sequences=2)
    group = hold(engine)
    leaving = [Reader(engine, request(prompt, 6)) for prompt in RAGGED[:2]]
    await eventually(lambda: group.waiting and engine.statistics().running == 2)
    newcomer = Reader(engine, request(RAGGED[4], 6))
    await leaving[0].leave()
    assert group.waiting, "one is left to compute for"
    await leaving[1].leave()
    # The newcomer is in the next step now, at the same gate: the first step was cancelled, not waited for.
    await eventually(lambda: group.waiting and engine.statistics().running == 1)
    group.gate.set()
    assert (await newcomer.task).tokens == (await alone(folder, request(RAGGED[4], 6))).tokens


async def test_who_arrives_while_a_given_up_step_ends_is_served(folder: Path, start: StartEngine) -> None:
    engine = start()
    group = hold(engine)
    group.slow_to_leave = 20
    leaving = Reader(engine, request(RAGGED[0], 6))
    await eventually(lambda: group.waiting)
    await leaving.leave()
    newcomer = Reader(engine, request(RAGGED[4], 6))
    await asyncio.sleep(0)
    assert group.waiting, "the cancelled step is still on its way out"
    group.gate.set()
    assert (await newcomer.task).tokens == (await alone(folder, request(RAGGED[4], 6))).tokens


async def test_an_iterator_that_is_never_started_costs_nothing(start: StartEngine) -> None:
    engine = start()
    chunks = engine.generate(request(RAGGED[0]))
    await chunks.aclose()
    assert engine.statistics().queue[:6] == (0, 0, 0, 0, 0, 0)


# Time.


async def test_time_runs_out_while_waiting(start: StartEngine) -> None:
    engine = start(max_sequences=1)
    group = hold(engine)
    first = Reader(engine, request(RAGGED[0], 6))
    await eventually(lambda: group.waiting)
    late = await read(engine.generate(request(RAGGED[1], 6, timeout_s=0.01)))
    assert isinstance(late.error, DeadlineExceededError)
    assert engine.statistics().queue.items == 0
    group.gate.set()
    assert (await first.task).reason == "length"


async def test_time_runs_out_while_running(folder: Path, start: StartEngine) -> None:
    engine = start()
    group = hold(engine)
    late = Reader(engine, request(RAGGED[0], 6, timeout_s=0.01))
    patient = Reader(engine, request(RAGGED[1], 6))
    assert isinstance((await late.task).error, DeadlineExceededError)
    group.gate.set()
    assert (await patient.task).tokens == (await alone(folder, request(RAGGED[1], 6))).tokens


async def test_no_time_at_all(start: StartEngine) -> None:
    engine = start()
    for timeout_s in (0.0, -1.0):
        answer = await read(engine.generate(request(RAGGED[0], timeout_s=timeout_s)))
        assert isinstance(answer.error, DeadlineExceededError)


async def test_deadlines_are_on_the_engines_clock(start: StartEngine) -> None:
    clock = Clock()
    engine = start(max_sequences=1, clock=clock)
    running = Reader(engine, request(RAGGED[0], 200, timeout_s=100))
    await eventually(lambda: len(running.answer.tokens) > 3)
    waiting = Reader(engine, request(RAGGED[1], 6, timeout_s=10))
    await eventually(lambda: engine.statistics().queue.items == 1)
    clock.now += 11
    assert isinstance((await waiting.task).error, DeadlineExceededError)
    assert engine.statistics().queue.expired == 1, "it never reached an expert"
    assert not running.task.done()
    clock.now += 100
    assert isinstance((await running.task).error, DeadlineExceededError)
    assert len(running.answer.tokens) < 200


async def test_experts_are_given_the_time_of_the_most_patient(start: StartEngine) -> None:
    deadlines: list[float] = []
    clock = Clock()
    engine = start(clock=clock)
    until = engine.dispatcher.until
    engine.dispatcher.until = lambda deadline, lanes: (deadlines.append(deadline), until(deadline))[1]  # type: ignore[method-assign]
    now = asyncio.get_running_loop().time()
    await asyncio.gather(*(read(engine.generate(request((1, 2), 1, timeout_s=t))) for t in (30, 50, 40)))
    assert now + 50 <= deadlines[0] < now + 110, "on the loop's clock, whatever the engine's says"


# Failures.


async def test_failing_experts_fail_the_sequences_of_that_step_and_no_others(
    folder: Path, start: StartEngine
) -> None:
    engine = start(max_step_tokens=40)
    group = hold(engine)
    failing = Reader(engine, request(RAGGED[3], 6))  # its prompt takes the whole budget of the step
    await eventually(lambda: engine.statistics().running == 1)
    group.failures = [UnavailableError("group-0: no live replica", retry_after_s=2.0)]
    group.gate.set()
    beside = Reader(engine, request(RAGGED[1], 6))
    error = (await failing.task).error
    assert isinstance(error, UnavailableError)
    assert error.retry_after_s == 2.0
    assert (await beside.task).tokens == (await alone(folder, request(RAGGED[1], 6))).tokens


@pytest.mark.parametrize("after_calls", [0, 1, 5])
async def test_the_engine_goes_on_after_a_failure(folder: Path, start: StartEngine, after_calls: int) -> None:
    """Also after one in the middle of a forward, with half of the layers' keys written."""
    engine = start()
    (group,) = controlled(engine)
    readers = [Reader(engine, request(prompt, 12)) for prompt in RAGGED[:3]]
    await eventually(lambda: len(group.layers) >= after_calls)
    group.failures = [ValueError("a bug in the experts")]
    errors = [(await reader.task).error for reader in readers]
    assert any(errors)
    for error in errors:
        assert error is None or (error.code, error.message) == ("internal_error", "the step failed: ValueError")
    await eventually(lambda: at_rest(engine))
    for prompt in RAGGED[:3]:
        answer = await read(engine.generate(request(prompt, 12)))
        assert answer.tokens == (await alone(folder, request(prompt, 12))).tokens


async def test_a_cancellation_out_of_nowhere_is_a_failure_like_others(folder: Path, start: StartEngine) -> None:
    engine = start()
    (group,) = controlled(engine)
    group.failures = [asyncio.CancelledError()]
    answer = await read(engine.generate(request(RAGGED[0], 6)))
    assert answer.error is not None
    assert answer.error.code == "internal_error"
    assert (await read(engine.generate(request(RAGGED[0], 6)))).reason == "length"


# The queue.


async def test_the_more_urgent_are_let_in_first(start: StartEngine) -> None:
    engine = start(max_sequences=1, clock=Clock())
    group = hold(engine)
    first = Reader(engine, request(RAGGED[0], 2, priority=0.0))
    await eventually(lambda: group.waiting)
    order: list[float] = []

    async def read_at(priority: float) -> None:
        async for chunk in engine.generate(request(RAGGED[1], 2, priority=priority)):
            if chunk.finish_reason is not None:
                order.append(priority)

    tasks = [asyncio.ensure_future(read_at(priority)) for priority in (0.2, 0.9, 0.0, 1.0, 0.5)]
    await eventually(lambda: engine.statistics().queue.items == 5)
    group.gate.set()
    await asyncio.gather(first.task, *tasks)
    assert order == [1.0, 0.9, 0.5, 0.2, 0.0]


async def test_a_full_queue_refuses_or_sheds_the_less_important(start: StartEngine) -> None:
    engine = start(max_sequences=1, queue=QueueLimits(max_items=1))
    group = hold(engine)
    running = Reader(engine, request(RAGGED[0], 3))
    await eventually(lambda: group.waiting)
    waiting = Reader(engine, request(RAGGED[1], 3, priority=0.5))
    await eventually(lambda: engine.statistics().queue.items == 1)
    refused = await read(engine.generate(request(RAGGED[2], 3, priority=0.5)))
    assert isinstance(refused.error, OverloadedError)
    assert refused.error.retry_after_s
    urgent = Reader(engine, request(RAGGED[2], 3, priority=0.9))
    assert isinstance((await waiting.task).error, OverloadedError)
    group.gate.set()
    assert (await urgent.task).reason == (await running.task).reason == "length"


# Closing.


async def test_closing_lets_what_runs_finish_and_fails_what_waits(folder: Path) -> None:
    engine = make_engine(folder, max_sequences=1, drain_s=60.0)
    engine.start()
    group = hold(engine)
    running = Reader(engine, request(RAGGED[0], 20))
    await eventually(lambda: group.waiting)
    waiting = Reader(engine, request(RAGGED[1], 6))
    await eventually(lambda: engine.statistics().queue.items == 1)
    closing = asyncio.ensure_future(engine.close())
    assert isinstance((await waiting.task).error, RequestCancelledError)
    refused = await read(engine.generate(request(RAGGED[2], 6)))
    assert isinstance(refused.error, RequestCancelledError)
    group.gate.set()
    assert (await running.task).tokens == (await alone(folder, request(RAGGED[0], 20))).tokens
    await within_patience(closing)
    assert at_rest(engine)


async def test_closing_fails_what_does_not_finish_in_time(folder: Path) -> None:
    engine = make_engine(folder, drain_s=0.0)
    engine.start()
    group = hold(engine)
    running = Reader(engine, request(RAGGED[0], 6))
    await eventually(lambda: group.waiting)
    await within_patience(engine.close())
    assert isinstance((await running.task).error, RequestCancelledError)
    assert at_rest(engine)
    assert not group.waiting


async def test_closing_during_a_step_that_is_given_up_ends(folder: Path) -> None:
    """Two cancellations at once: the step's, which the engine survives, and the engine's own."""
    engine = make_engine(folder, drain_s=0.0)
    engine.start()
    group = hold(engine)
    group.slow_to_leave = 20
    leaving = Reader(engine, request(RAGGED[0], 6))
    await eventually(lambda: group.waiting)
    await leaving.leave()
    await within_patience(engine.close())
    assert at_rest(engine)


async def test_closing_an_idle_engine_and_one_that_never_ran(folder: Path) -> None:
    for started in (False, True):
        engine = make_engine(folder, drain_s=60.0)
        if started:
            engine.start()
            await read(engine.generate(request(RAGGED[0], 2)))
        await within_patience(engine.close())
        assert at_rest(engine)


# Everything at once.


@dataclass(frozen=True)
class Visitor:
    """A request, after how many turns of the loop it comes, and after how many tokens it leaves (None: never; 0:
    after `turns_until_leaving` turns, wherever it is then)."""

    asked: GenerateRequest
    arrival_turns: int
    leave_after: int | None
    turns_until_leaving: int


COMMON = prompt_of(20)


@st.composite
def visitors(draw: st.DrawFn) -> Visitor:
    """Much of what they ask begins alike. Their time is on a clock that advances by one second a layer."""
    own = prompt_of(draw(st.integers(1, 12)), draw(st.integers(0, 3)))
    asked = request(
        (*COMMON[: draw(st.sampled_from([0, 0, 9, 20]))], *own),
        draw(st.integers(1, 14)),
        priority=draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])),
        timeout_s=draw(st.sampled_from([1e6, 1e6, 1e6, 70.0])),
        tenant=draw(st.sampled_from(["", "", "another"])),
        temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
        seed=draw(st.integers(0, 2)),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )
    leave_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 6)))
    return Visitor(asked, draw(st.integers(0, 60)), leave_after, draw(st.integers(0, 40)))


async def visit(engine: Engine, visitor: Visitor) -> tuple[Answer, bool]:
    """The answer as far as it was read, and whether the visitor stayed to the end."""
    for _ in range(visitor.arrival_turns):
        await asyncio.sleep(0)
    if visitor.leave_after is None:
        return await read(engine.generate(visitor.asked)), True
    if visitor.leave_after == 0:
        reader = Reader(engine, visitor.asked)
        for _ in range(visitor.turns_until_leaving):
            await asyncio.sleep(0)
        await reader.leave()
        return reader.answer, reader.answer.reason is not None
    answer = Answer()
    async with contextlib.aclosing(engine.generate(visitor.asked)) as chunks:
        try:
            async for chunk in chunks:
                answer.tokens += chunk.token_ids
                answer.reason = chunk.finish_reason
                if len(answer.tokens) >= visitor.leave_after:
                    break
        except PimoeError as error:
            answer.error = error
    return answer, answer.reason is not None


@dataclass(frozen=True)
class Crowd:
    """Visitors, an engine's limits, and the call of its experts that fails."""

    visitors: list[Visitor]
    limits: dict[str, int]
    fail_at_call: int | None


@st.composite
def crowds(draw: st.DrawFn) -> Crowd:
    # 12 blocks of 4 tokens are what the longest of them may take.
    limits = {
        "max_sequences": draw(st.integers(1, 5)),
        "max_step_tokens": draw(st.integers(1, 30)),
        "kv_blocks": draw(st.sampled_from([12, 13, 16, 200])),
    }
    everyone = draw(st.lists(visitors(), min_size=2, max_size=10))
    return Crowd(everyone, limits, draw(st.one_of(st.none(), st.none(), st.integers(1, 40))))


async def visited(folder: Path, crowd: Crowd) -> int:
    """Runs the whole crowd through one engine and holds it to what was promised; its preemptions."""
    clock = Clock()
    # Who is late is told by its deadline: nobody is shed for waiting long.
    queue = QueueLimits(target_delay_s=1e9, standing_s=1e9)
    engine = make_engine(folder, clock=clock, queue=queue, block_tokens=4, **crowd.limits)
    (group,) = controlled(engine)
    forward = group.run

    async def run(*args: Any) -> Any:
        clock.now += 1
        if len(group.layers) + 1 == crowd.fail_at_call:
            group.failures = [UnavailableError("gone for a moment")]
        return await forward(*args)

    group.run = run
    engine.start()
    outcomes = await within_patience(asyncio.gather(*(visit(engine, visitor) for visitor in crowd.visitors)))
    await eventually(lambda: at_rest(engine))
    await within_patience(engine.close())
    failed = 0
    for visitor, (answer, stayed) in zip(crowd.visitors, outcomes, strict=True):
        own = await alone(folder, visitor.asked)
        assert answer.tokens == own.tokens[: len(answer.tokens)]
        if isinstance(answer.error, UnavailableError):
            failed += 1
        elif answer.error is not None:
            assert isinstance(answer.error, DeadlineExceededError | OverloadedError)
            assert visitor.asked.timeout_s < 1e6
        elif stayed:
            assert (answer.tokens, answer.reason) == (own.tokens, own.reason)
    assert failed <= (0 if crowd.fail_at_call is None else crowd.limits["max_sequences"])
    blocks = engine.statistics().kv_blocks
    assert blocks.free + blocks.kept == blocks.total
    return engine.statistics().preemptions


def test_every_request_ends_once_with_its_own_tokens_and_every_block_returns(folder: Path) -> None:
    preemptions: list[int] = []

    @settings(max_examples=25, deadline=None)
    @given(crowds())
    def each(crowd: Crowd) -> None:
        preemptions.append(asyncio.run(visited(folder, crowd)))
        target(float(preemptions[-1]))

    each()
    assert sum(map(bool, preemptions)) > len(preemptions) / 4, "nearly nobody had to make room"
