"""The engine's memory: what is reused, who is preempted, and that nobody notices.

Preempted sequences go on with the tokens that they would have had; whatever else may happen to a sequence may
happen to it while it is preempted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
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
from pimoe.runtime.batching import QueueLimits
from pimoe.runtime.errors import DeadlineExceededError, PimoeError, RequestCancelledError, UnavailableError
from pimoe.runtime.generation.engine import Engine
from pimoe.runtime.model.decoder import ForwardBatch, Segment
from pimoe.runtime.requests import GenerateRequest, TokenLogprob
from waiting import eventually, nothing_left_behind, within_patience  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[StartEngine]:
    async with started_engines(folder) as start_engine:
        yield start_engine


LOW = request(prompt_of(21), 30, priority=0.0)
URGENT = request(prompt_of(6, 1), 5, priority=1.0)


async def preempt(engine: Engine, low: GenerateRequest = LOW, after: int = 4) -> tuple[Reader, Reader, Any]:
    """An engine of one seat, in which `low` has given way to an urgent request after so many tokens. It is held in
    the first step of that."""
    (group,) = controlled(engine)
    first = Reader(engine, low)
    group.hold_when = lambda: len(first.answer.tokens) >= after
    await eventually(lambda: group.waiting)
    second = Reader(engine, URGENT)
    await eventually(lambda: engine.statistics().queue.items == 1)
    group.hold_when = lambda: engine.statistics().preempted
    group.gate.set()
    await eventually(lambda: engine.statistics().preempted == 1 and group.waiting)
    return first, second, group


# Reuse.


async def test_the_first_chunk_tells_what_was_not_computed(folder: Path, start: StartEngine) -> None:
    engine = start(block_tokens=8)
    prompt = prompt_of(30)
    expected = await alone(folder, request(prompt, 6))
    for cached in (0, 24):
        before = engine.statistics().prefill_tokens
        answer = await read(engine.generate(request(prompt, 6)))
        assert answer.tokens == expected.tokens
        assert [chunk.cached_tokens for chunk in answer.chunks] == [cached, *[0] * 5]
        assert engine.statistics().prefill_tokens - before == 30 - cached
    await eventually(lambda: at_rest(engine))
    blocks = engine.statistics().kv_blocks
    assert (blocks.prefix_query_tokens, blocks.prefix_hit_tokens) == (60, 24)
    assert (blocks.held, blocks.kept) == (0, 4), "of 35 tokens the last was never computed"


async def test_a_conversation_goes_on_where_it_was(folder: Path, start: StartEngine) -> None:
    """The next turn's prompt is the last one's, its answer and more."""
    engine = start(block_tokens=4)
    prompt: tuple[int, ...] = prompt_of(10)
    for turn in range(4):
        answer = await read(engine.generate(request(prompt, 6)))
        assert answer.tokens == (await alone(folder, request(prompt, 6))).tokens
        # All before the last token of the last answer is known, as far as it fills blocks.
        known = (len(prompt) - 3 - 1) // 4 * 4 if turn else 0
        assert answer.chunks[0].cached_tokens == known
        prompt = (*prompt, *answer.tokens, *prompt_of(3, turn))


async def test_those_who_begin_alike_at_once_share_what_is_computed(folder: Path, start: StartEngine) -> None:
    engine = start(block_tokens=4)
    group = hold(engine)
    asked = [request((*prompt_of(16), n), 8) for n in (1, 2, 3)]
    first = Reader(engine, asked[0])
    await eventually(lambda: group.waiting)
    others = [Reader(engine, one) for one in asked[1:]]
    group.hold_when = lambda: engine.statistics().running == 3
    group.gate.set()
    await eventually(lambda: engine.statistics().running == 3 and group.waiting)
    assert engine.statistics().kv_blocks.held == 4 + 3, "the beginning lies there once"
    group.gate.set()
    for reader, one in zip([first, *others], asked, strict=True):
        assert (await reader.task).tokens == (await alone(folder, one)).tokens
    assert [reader.answer.chunks[0].cached_tokens for reader in others] == [16, 16]


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"cache_salt": "pepper"}])
async def test_tenants_and_salts_share_no_blocks(start: StartEngine, other: dict[str, str]) -> None:
    engine = start(block_tokens=4)
    prompt = prompt_of(17)
    cached = []
    for keys in ({}, other, {}, other):
        answer = await read(engine.generate(request(prompt, 3, **keys)))  # type: ignore[arg-type]
        cached.append(answer.chunks[0].cached_tokens)
    assert cached == [0, 0, 16, 16]


async def test_any_text_is_a_salt(start: StartEngine) -> None:
    """Also a lone surrogate, as JSON may hold it: it must not stop the engine."""
    engine = start()
    answer = await read(engine.generate(request(prompt_of(3), 2, tenant="\ud800", cache_salt="\udfff")))
    assert answer.reason == "length"
    assert engine.alive


async def test_nothing_is_reused_where_that_is_switched_off(start: StartEngine) -> None:
    engine = start(block_tokens=4, reuse_prefixes=False)
    for _ in range(2):
        answer = await read(engine.generate(request(prompt_of(17), 3)))
        assert answer.chunks[0].cached_tokens == 0
    assert engine.statistics().kv_blocks.kept == 0


async def test_what_is_known_makes_room_for_what_is_new(folder: Path, start: StartEngine) -> None:
    engine = start(block_tokens=4, kv_blocks=8)
    for seed in range(6):
        asked = request(prompt_of(20, seed), 6)
        assert (await read(engine.generate(asked))).tokens == (await alone(folder, asked)).tokens
    blocks = engine.statistics().kv_blocks
    assert blocks.evictions > 10
    assert blocks.free + blocks.kept == blocks.total == 8
    assert engine.statistics().preemptions == 0


@pytest.mark.parametrize("after_calls", [1, 2, 3])
async def test_what_a_failed_step_wrote_is_not_reused(folder: Path, start: StartEngine, after_calls: int) -> None:
    engine = start(block_tokens=4, max_step_tokens=8)
    (group,) = controlled(engine)
    prompt = prompt_of(30)
    reader = Reader(engine, request(prompt, 6))
    group.hold_when = lambda: len(group.layers) == after_calls
    await eventually(lambda: group.waiting)
    group.failures = [UnavailableError("gone")]
    group.gate.set()
    assert (await reader.task).error is not None
    await eventually(lambda: at_rest(engine))
    known = engine.statistics().kv_blocks.kept * 4
    answer = await read(engine.generate(request(prompt, 6)))
    assert answer.tokens == (await alone(folder, request(prompt, 6))).tokens
    assert answer.chunks[0].cached_tokens == known <= 8 * after_calls


async def test_a_step_given_up_publishes_nothing(folder: Path, start: StartEngine) -> None:
    engine = start(block_tokens=4)
    group = hold(engine)
    leaving = Reader(engine, request(prompt_of(30), 6))
    await eventually(lambda: group.waiting)
    await leaving.leave()
    await eventually(lambda: at_rest(engine))
    assert engine.statistics().kv_blocks.kept == 0
    group.gate.set()
    answer = await read(engine.generate(request(prompt_of(30), 6)))
    assert answer.chunks[0].cached_tokens == 0
    assert answer.tokens == (await alone(folder, request(prompt_of(30), 6))).tokens


# Preemption.


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.1, "seed": 5, "top_p": 0.9, "logprobs": 1},
        {"temperature": 0.8, "seed": 9, "presence_penalty": 1.0, "repetition_penalty": 1.3, "min_tokens": 9},
    ],
    ids=["greedy", "drawn", "penalties"],
)
@pytest.mark.parametrize("reuse", [True, False])
async def test_a_preempted_generation_goes_on_with_the_tokens_it_would_have_had(
    folder: Path, start: StartEngine, sampling: dict[str, Any], reuse: bool
) -> None:
    low = request(prompt_of(21), 30, priority=0.0, **sampling)
    engine = start(max_sequences=1, block_tokens=4, reuse_prefixes=reuse)
    first, second, group = await preempt(engine, low)
    group.gate.set()
    answer, expected = await first.task, await alone(folder, low)
    assert (answer.tokens, answer.reason) == (expected.tokens, "length")
    assert [item.token_id for item in answer.logprobs] == [item.token_id for item in expected.logprobs]
    assert (await second.task).tokens == (await alone(folder, URGENT)).tokens
    statistics = engine.statistics()
    assert statistics.preemptions == 1
    # The keys and values of 25 tokens were there, of which 24 filled blocks.
    again = 1 if reuse else 25
    assert statistics.prefill_tokens + statistics.decode_tokens == (21 + 29) + (6 + 4) + again
    assert [chunk.cached_tokens for chunk in answer.chunks] == [0] * 30


async def test_who_is_urgent_does_not_wait_for_who_is_not(start: StartEngine) -> None:
    engine = start(max_sequences=2)
    low = [Reader(engine, request(prompt_of(5, seed), 150, priority=0.0)) for seed in (0, 1)]
    await eventually(lambda: all(reader.answer.tokens for reader in low))
    answers = await asyncio.gather(*(read(engine.generate(URGENT)) for _ in range(3)))
    assert [answer.reason for answer in answers] == ["length"] * 3
    assert not any(reader.task.done() for reader in low)
    assert engine.statistics().preemptions == 2, "each gave way once"
    for reader in low:
        assert (await reader.task).reason == "length"


async def begun(engine: Engine, *asked: GenerateRequest) -> list[Reader]:
    """Readers of requests, all of which have got tokens."""
    readers = [Reader(engine, one) for one in asked]
    await eventually(lambda: all(reader.answer.tokens for reader in readers))
    return readers


def patient(seed: int, priority: float = 0.0) -> GenerateRequest:
    return request(prompt_of(5, seed), 240, priority=priority, timeout_s=1e5)


async def test_a_backlog_does_not_keep_the_urgent_from_taking_over(start: StartEngine) -> None:
    """It is older than its patience, and so before them in the queue; but it can only wait for a free seat."""
    clock = Clock()
    engine = start(max_sequences=2, clock=clock, queue=QueueLimits(target_delay_s=1e6, standing_s=1e6))
    running = await begun(engine, patient(0), patient(1))
    backlog = [Reader(engine, patient(seed)) for seed in (2, 3, 4)]
    await eventually(lambda: engine.statistics().queue.items == 3)
    clock.now += 5
    assert (await Reader(engine, URGENT).task).reason == "length"
    assert not any(reader.task.done() for reader in (*running, *backlog))
    assert engine.statistics().preemptions == 1
    for reader in (*running, *backlog):
        await reader.leave()


async def test_who_was_preempted_does_not_keep_the_urgent_from_taking_over(start: StartEngine) -> None:
    clock = Clock()
    engine = start(max_sequences=2, clock=clock)
    low = await begun(engine, patient(0), patient(1))
    (first,) = await begun(engine, patient(2, priority=1.0))
    clock.now += 5
    assert (await Reader(engine, URGENT).task).reason == "length"
    assert not first.task.done()
    assert engine.statistics().preemptions == 2
    for reader in (*low, first):
        await reader.leave()


async def test_in_order_of_arrival_nobody_takes_over(start: StartEngine) -> None:
    engine = start(max_sequences=1, queue=QueueLimits(order="fifo"))
    (low,) = await begun(engine, request(prompt_of(5), 60, priority=0.0))
    assert (await Reader(engine, URGENT).task).reason == "length"
    assert low.task.done()
    assert engine.statistics().preemptions == 0


async def test_nobody_makes_room_for_its_own_class(start: StartEngine) -> None:
    engine = start(max_sequences=1)
    first = Reader(engine, request(prompt_of(5), 20, priority=0.5))
    await eventually(lambda: first.answer.tokens)
    second = Reader(engine, request(prompt_of(5, 1), 2, priority=0.5))
    assert (await second.task).reason == "length"
    assert first.task.done()
    assert engine.statistics().preemptions == 0


async def test_a_preempted_sequence_may_run_out_of_time(start: StartEngine) -> None:
    clock = Clock()
    engine = start(max_sequences=1, clock=clock)
    first, second, group = await preempt(engine, request(prompt_of(21), 200, priority=0.0, timeout_s=50))
    given = list(first.answer.tokens)
    clock.now += 51
    group.gate.set()
    assert isinstance((await first.task).error, DeadlineExceededError)
    assert first.answer.tokens == given
    assert (await second.task).reason == "length"
    await eventually(lambda: at_rest(engine))


async def test_time_runs_out_at_once_also_while_a_step_hangs(start: StartEngine) -> None:
    engine = start(max_sequences=1)
    first, second, group = await preempt(engine, request(prompt_of(21), 200, priority=0.0, timeout_s=1.0))
    assert isinstance((await first.task).error, DeadlineExceededError)
    assert group.waiting, "the other's step goes on"
    group.gate.set()
    assert (await second.task).reason == "length"


async def test_a_preempted_sequence_may_be_cancelled(folder: Path, start: StartEngine) -> None:
    engine = start(max_sequences=1)
    first, second, group = await preempt(engine)
    steps = engine.statistics().steps
    await first.leave()
    assert group.waiting, "the other's step goes on"
    group.gate.set()
    assert (await second.task).tokens == (await alone(folder, URGENT)).tokens
    await eventually(lambda: at_rest(engine))
    assert engine.statistics().steps - steps == 5, "no step was computed for who left"


async def test_a_preempted_sequence_goes_on_when_the_others_leave(folder: Path, start: StartEngine) -> None:
    engine = start(max_sequences=1)
    first, second, group = await preempt(engine)
    await second.leave()
    group.gate.set()
    assert (await first.task).tokens == (await alone(folder, LOW)).tokens


async def test_a_preempted_sequence_survives_the_failure_of_others(folder: Path, start: StartEngine) -> None:
    engine = start(max_sequences=1)
    first, second, group = await preempt(engine)
    group.failures = [UnavailableError("gone")]
    group.gate.set()
    assert isinstance((await second.task).error, UnavailableError)
    assert (await first.task).tokens == (await alone(folder, LOW)).tokens


@pytest.mark.parametrize("drain_s", [0.0, 60.0])
async def test_closing_while_some_are_preempted(folder: Path, drain_s: float) -> None:
    engine = make_engine(folder, max_sequences=1, drain_s=drain_s)
    engine.start()
    first, second, group = await preempt(engine)
    closing = asyncio.ensure_future(engine.close())
    if drain_s:
        group.gate.set()
    await within_patience(closing)
    for reader, asked in ((first, LOW), (second, URGENT)):
        answer = await reader.task
        if drain_s:
            assert answer.tokens == (await alone(folder, asked)).tokens
        else:
            assert isinstance(answer.error, RequestCancelledError)
    assert at_rest(engine)


async def test_a_context_may_fill_all_blocks_beside_others(folder: Path, start: StartEngine) -> None:
    engine = start(block_tokens=1, kv_blocks=24, max_sequences=6)
    assert engine.max_context_tokens == 24
    asked = [request(prompt_of(4 + seed, seed), 20 - seed) for seed in range(5)]
    answers = await asyncio.gather(*(read(engine.generate(one)) for one in asked))
    for answer, one in zip(answers, asked, strict=True):
        assert answer.tokens == (await alone(folder, one)).tokens
    assert engine.statistics().preemptions


async def test_a_window_is_kept_through_reuse_and_preemption(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, sliding_window=7, num_hidden_layers=2)
    engine = make_engine(folder, block_tokens=4, kv_blocks=16, max_step_tokens=9)
    engine.start()
    asked = [request((*prompt_of(18), *prompt_of(3, seed)), 30) for seed in range(4)]
    for _ in range(2):
        answers = await asyncio.gather(*(read(engine.generate(one)) for one in asked))
        for answer, one in zip(answers, asked, strict=True):
            assert answer.tokens == (await alone(folder, one)).tokens
    statistics = engine.statistics()
    assert statistics.preemptions
    assert statistics.kv_blocks.prefix_hit_tokens
    await within_patience(engine.close())


# Log-probabilities of the prompt.


async def plain_logprobs(folder: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    """`[tokens, vocab]` of one forward over the whole prompt."""
    engine = make_engine(folder)
    cache = engine.decoder.new_cache(1, len(prompt))
    rows = torch.arange(len(prompt))
    batch = ForwardBatch(torch.tensor(prompt), (Segment([1], 0, len(prompt)),), rows)
    experts = engine.dispatcher.until(asyncio.get_running_loop().time() + 60)
    return torch.log_softmax(await engine.decoder.forward(batch, cache, experts), -1)


def expect_logprobs(
    told: tuple[TokenLogprob | None, ...] | None, prompt: tuple[int, ...], of: torch.Tensor
) -> None:
    assert told is not None
    assert told[0] is None
    items = [item for item in told[1:] if item is not None]
    assert [item.token_id for item in items] == list(prompt[1:])
    assert [item.logprob for item in items] == pytest.approx(
        of[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist(), abs=1e-4
    )
    for item, row in zip(items, of[:-1], strict=True):
        best = row.topk(2)
        assert [token for token, _ in item.top] == best.indices.tolist()
        assert [value for _, value in item.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 130])
@pytest.mark.parametrize("step_tokens", [512, 7])
async def test_prompt_logprobs_are_those_of_a_plain_forward(
    folder: Path, start: StartEngine, length: int, step_tokens: int
) -> None:
    prompt = prompt_of(length)
    engine = start(max_step_tokens=step_tokens)
    plain = await plain_logprobs(folder, prompt)
    for _ in range(2):
        answer = await read(engine.generate(request(prompt, 3, prompt_logprobs=2)))
        assert answer.tokens == (await alone(folder, request(prompt, 3))).tokens
        expect_logprobs(answer.chunks[0].prompt_logprobs, prompt, plain)
        assert answer.chunks[0].cached_tokens == 0
        assert all(chunk.prompt_logprobs is None for chunk in answer.chunks[1:])


@pytest.mark.parametrize("calls", [1, 2, 5, 9, 13])
async def test_prompt_logprobs_survive_a_preemption_in_the_middle(
    folder: Path, start: StartEngine, calls: int
) -> None:
    """Of 50 tokens in chunks of 8, in two layers of which each chunk but the last computes one."""
    prompt = prompt_of(50)
    engine = start(max_sequences=1, max_step_tokens=8, block_tokens=4)
    (group,) = controlled(engine)
    asking = Reader(engine, request(prompt, 4, priority=0.0, prompt_logprobs=2))
    group.hold_when = lambda: len(group.layers) == calls
    await eventually(lambda: group.waiting)
    urgent = Reader(engine, URGENT)
    await eventually(lambda: engine.statistics().queue.items == 1)
    group.gate.set()
    assert (await urgent.task).reason == "length"
    answer = await asking.task
    assert engine.statistics().preemptions == 1
    assert answer.tokens == (await alone(folder, request(prompt, 4))).tokens
    expect_logprobs(answer.chunks[0].prompt_logprobs, prompt, await plain_logprobs(folder, prompt))


# Failures.


async def test_a_failing_step_leaves_the_books_right(folder: Path, start: StartEngine) -> None:
    engine = start(block_tokens=4, kv_blocks=20, max_sequences=4)
    (group,) = controlled(engine)
    asked = [request((*prompt_of(9), *prompt_of(2, seed)), 30) for seed in range(4)]
    for fail_after in (3, 40, 60):
        readers = [Reader(engine, one) for one in asked]
        until = len(group.layers) + fail_after
        group.hold_when = lambda until=until: len(group.layers) >= until
        await eventually(lambda: group.waiting)
        group.failures = [UnavailableError("gone")]
        group.gate.set()
        for reader, one in zip(readers, asked, strict=True):
            answer = await reader.task
            own = await alone(folder, one)
            assert answer.tokens == own.tokens[: len(answer.tokens)]
            assert isinstance(answer.error, UnavailableError) or answer.reason == "length"
        await eventually(lambda: at_rest(engine))
        blocks = engine.statistics().kv_blocks
        assert blocks.free + blocks.kept == blocks.total == 20


async def test_errors_of_one_are_not_those_of_others(folder: Path, start: StartEngine) -> None:
    """Who is preempted by a request that can never be answered still has its own."""
    engine = start(max_sequences=1, block_tokens=4, kv_blocks=14)
    first = Reader(engine, request(prompt_of(21), 30, priority=0.0))
    await eventually(lambda: first.answer.tokens)
    answer: Answer = await read(engine.generate(request(prompt_of(30), 40, priority=1.0)))
    assert isinstance(answer.error, PimoeError)
    assert (await first.task).tokens == (await alone(folder, LOW)).tokens
    assert engine.statistics().preemptions == 0


async def test_numbers_that_are_not_finite_fail_one_answer_and_are_not_reused(
    folder: Path, start: StartEngine
) -> None:
    """A replica that computes NaN once must not spoil a prompt's beginning for all who come later."""
    engine = start(block_tokens=4, max_step_tokens=16)
    (group,) = controlled(engine)
    forward = group.run

    async def run(layer: int, rows: Any, deadline: float) -> Any:
        out = await forward(layer, rows, deadline)
        return out * torch.nan if len(group.layers) == 2 else out

    group.run = run
    asked = request(prompt_of(40), 6)
    spoilt = await read(engine.generate(asked))
    assert spoilt.error is not None
    assert (spoilt.tokens, spoilt.error.code) == ([], "internal_error")
    await eventually(lambda: at_rest(engine))
    answer = await read(engine.generate(asked))
    assert answer.tokens == (await alone(folder, asked)).tokens
    assert answer.chunks[0].cached_tokens == 0


async def test_a_prompt_that_is_mostly_known_is_not_given_up_for_its_length(start: StartEngine) -> None:
    """Whether a first token can be in time depends on what is left to compute."""
    engine = start(block_tokens=4)
    await read(engine.generate(request(prompt_of(41), 2)))
    beside = Reader(engine, request(prompt_of(5, 1), 150))
    await eventually(lambda: beside.answer.tokens)
    engine.latency.least_s = lambda tokens: float(tokens)  # type: ignore[method-assign]
    known = await read(engine.generate(request(prompt_of(41), 2, timeout_s=20.0)))
    assert known.reason == "length"
    new = await read(engine.generate(request(prompt_of(41, 2), 2, timeout_s=20.0)))
    assert isinstance(new.error, DeadlineExceededError)
    await beside.leave()
