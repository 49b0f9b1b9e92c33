"""The result cache without HTTP: a look-up, a hit of the cached backend, and the same request computed."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from cache_requests import ANSWER_TOKENS, COMPLETION, TENSOR, TENSOR_TOKENS, hidden_states
from pimoe.runtime.caching import CachedBackend, CacheLimits, ResultCache
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.requests import GenerateRequest, InferRequest, ModelInfo, SamplingParams, TensorData
from report import median_quantile, progress, table
from rounds import timed

LOOK_UP, HIT, COMPUTED = "look-up", "hit", "computed"
WAYS = (LOOK_UP, HIT, COMPUTED)
_PROMPT_TOKENS = 10


@dataclass(frozen=True)
class Local:
    """One way to answer one request in this process, one after the other.

    Attributes:
        per_s: answers per second, median over rounds.
        to_computed: how many times as many as computed.
    """

    request: str
    way: str
    per_s: float
    p50_us: float
    p99_us: float
    to_computed: float


async def measure_local(rounds: int, calls: int, computed_calls: int) -> list[Local]:
    """With one torch thread; on the loop of the caller."""
    torch.set_num_threads(1)
    progress("cache in-process: loading the model")
    async with await LocalRuntime.start(CHECKPOINT) as runtime:
        backend = CachedBackend(runtime.router, ResultCache(CacheLimits()))
        ways = {**_completions(backend), **_tensors(backend)}
        times: dict[tuple[str, str], list[list[float]]] = {case: [] for case in ways}
        for index in range(rounds):
            progress(f"cache in-process: round {index + 1} of {rounds}")
            for case, call in ways.items():
                times[case].append(await timed(call, computed_calls if case[1] == COMPUTED else calls))
    return [_local(case, times) for case in ways]


Call = Callable[[], Awaitable[None]]


def _completions(backend: CachedBackend) -> dict[tuple[str, str], Call]:
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    request = GenerateRequest("0", tuple(range(10, 10 + _PROMPT_TOKENS)), sampling)
    ids = map(str, count())

    async def ask(past: bool) -> None:
        answer = await backend.generate(replace(request, request_id=next(ids)), "asked" if past else None)
        tokens = [token async for chunk in answer.chunks for token in chunk.token_ids]
        if len(tokens) != ANSWER_TOKENS:
            raise RuntimeError(f"{len(tokens)} tokens instead of {ANSWER_TOKENS}")

    return _ways(COMPLETION, ask)


def _tensors(backend: CachedBackend) -> dict[tuple[str, str], Call]:
    model: ModelInfo = backend.model
    array = hidden_states(TENSOR_TOKENS, model.hidden_size, 0)
    request = InferRequest("0", TensorData("float32", array.shape, array.tobytes()))
    ids = map(str, count())

    async def ask(past: bool) -> None:
        answer = await backend.infer(replace(request, request_id=next(ids)), "asked" if past else None)
        if answer.result.output.shape != array.shape:
            raise RuntimeError(f"an answer of shape {answer.result.output.shape}")

    return _ways(TENSOR, ask)


def _ways(name: str, ask: Callable[[bool], Awaitable[None]]) -> dict[tuple[str, str], Call]:
    """A look-up is a `get` of the store alone, of a key that is there."""
    cache: ResultCache[str] = ResultCache(CacheLimits())
    cache.put(key := bytes(32), name, 1024)

    async def look_up() -> None:
        cache.get(key)

    calls: tuple[Call, ...] = (look_up, lambda: ask(False), lambda: ask(True))
    return dict(zip(((name, way) for way in WAYS), calls, strict=True))


def _local(case: tuple[str, str], times: dict[tuple[str, str], list[list[float]]]) -> Local:
    rate, computed = (_per_s(times[key]) for key in (case, (case[0], COMPUTED)))
    p50, p99 = (1e6 * median_quantile(times[case], share) for share in (0.5, 0.99))
    return Local(*case, rate, p50, p99, rate / computed)


def _per_s(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.median(len(times) / sum(times) for times in rounds)


def local_table(results: Sequence[Local]) -> str:
    """For people."""
    title = "The cache in this process, one request after the other (medians of rounds)"
    rows = [
        (r.request, r.way, f"{r.per_s:,.0f}", f"{r.p50_us:,.1f}", f"{r.p99_us:,.1f}", f"{r.to_computed:,.0f}x")
        for r in results
    ]
    return table(title, ("request", "way", "per s", "p50 us", "p99 us", "to computed"), rows)


def run_local(rounds: int, calls: int, computed_calls: int) -> list[Local]:
    """`measure_local` on a loop as the replicas have it."""
    from pimoe.runtime.loop_thread import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(measure_local(rounds, calls, computed_calls))
