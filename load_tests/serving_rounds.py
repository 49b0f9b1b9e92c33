"""The rounds of `compare_serving.py`: each server in turn runs alone, and is checked, loaded and weighed."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from closed_loop import measure as closed_loop
from report import progress
from serving_client import Connection, request_bytes, run
from serving_contenders import Contender
from serving_model import Sample, WrongAnswerError
from serving_open_loop import OpenLoop, offer, poisson
from serving_process import Server, StartError, ask, running
from wrk import Load, Target, WrkError

MOST_ERRORS = 0.01  # of requests; a server that fails more often is not measured
_IDLE_TIMEOUT_S = 60.0


class ServerError(Exception):
    """A server does not answer any more, or not rightly."""


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all servers, and starts each of them anew.
        connections: of the closed loops, which take `closed_s` each.
        warm_s: a closed loop at the most connections before the others, not counted; memory is taken in its midst.
        alone: rivals (keys) that are set up for 1 connection too; they take part in the first `alone_rounds` only.
        open_shares: rates of the open loops, in parts of what the best rival does in a closed loop; in the last
            round only, when that is known. With one round only, `open_rates` instead, in requests/s.
        ceiling_tokens, ceiling_times: the plain forward, how large and how often in each round.
    """

    rounds: int = 3
    connections: tuple[int, ...] = (1, 32, 128)
    closed_s: int = 3
    warm_s: int = 1
    open_shares: tuple[float, ...] = (0.3, 0.6, 0.9)
    open_rates: tuple[float, ...] = ()
    open_s: float = 3.0
    bodies: int = 512
    ceiling_tokens: int = 256
    ceiling_times: int = 15
    alone: tuple[str, ...] = ("mosec", "litserve", "bentoml", "triton", "serve-haproxy")
    alone_rounds: int = 2


@dataclass
class Measured:
    """Of one server, a value for each round.

    Attributes:
        closed: by connections.
        open: by requests/s offered.
        faults: by connections: why it has no rate there.
        failed: why it was given up.
    """

    start_s: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    closed: dict[int, list[Load]] = field(default_factory=dict)
    open: dict[float, OpenLoop] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    failed: str | None = None

    def rates(self) -> dict[int, list[Load]]:
        """What counts, by connections."""
        return {count: loads for count, loads in self.closed.items() if count not in self.faults}


def measure(
    contenders: Sequence[Contender], model: Path, sample: Sample, preset: Preset, ceiling: list[float]
) -> dict[str, Measured]:
    """All rounds.

    Args:
        sample: its bodies are what is sent, none of them twice in a row of as many requests.
        ceiling: tokens/s of the plain forward go there, one of each round.
    """
    found = {contender.key: Measured() for contender in contenders}
    for number in range(preset.rounds):
        ceiling.append(sample.tokens_per_s(preset.ceiling_tokens, preset.ceiling_times))
        rates = preset.open_rates
        if number == preset.rounds - 1 and number > 0:
            best = best_rival(contenders, found)
            rates = tuple(share * best for share in preset.open_shares) if best else rates
        here = [one for one in contenders if not one.is_alone or number < preset.alone_rounds]
        # Another one begins in each round.
        shift = number * len(here) // preset.rounds
        for contender in (*here[shift:], *here[:shift]):
            measured = found[contender.key]
            if measured.failed is None:
                progress(f"round {number + 1} of {preset.rounds}: {contender.title}")
                try:
                    _one_round(contender, model, sample, preset, () if contender.is_alone else rates, measured)
                except (StartError, WrongAnswerError, ServerError, WrkError, OSError) as error:
                    measured.failed = f"{type(error).__name__}: {error}"
                progress(f"{contender.title}: {_said(measured)}")
    return found


def _said(measured: Measured) -> str:
    if measured.failed is not None:
        return f"failed: {measured.failed}"
    rates = " / ".join(f"{loads[-1].requests_per_s:,.0f}" for loads in measured.closed.values())
    faults = "".join(f"; at {count} connections it {fault}" for count, fault in measured.faults.items())
    return f"{rates} requests/s{faults}"


def best_rival(contenders: Sequence[Contender], found: dict[str, Measured]) -> float:
    """The most requests/s that any of them did in any closed loop so far; 0 without any."""
    loads = [
        load
        for contender in contenders
        if not contender.is_ours and found[contender.key].failed is None
        for rounds in found[contender.key].rates().values()
        for load in rounds
    ]
    return max((load.requests_per_s for load in loads), default=0.0)


def _one_round(
    contender: Contender,
    model: Path,
    sample: Sample,
    preset: Preset,
    rates: Sequence[float],
    measured: Measured,
) -> None:
    requests = [request_bytes(contender.path, contender.headers, body) for body in sample.bodies]
    levels = (1,) if contender.is_alone else preset.connections
    with running(contender, model, sample) as server:
        run(lambda: check_all(server, requests, sample, max(preset.connections)))
        target = Target(server.url, "POST", contender.headers, sample.bodies)
        measured.memory_bytes.append(_memory_under_load(server, target, max(levels), preset.warm_s))
        for connections in levels:
            until_idle(server, sample)
            load = closed_loop(target, connections, preset.closed_s)
            measured.closed.setdefault(connections, []).append(load)
            if (fault := load.fault(MOST_ERRORS)) is not None:
                measured.faults.setdefault(connections, fault)
        for rate in rates:
            until_idle(server, sample)
            due = poisson(rate, preset.open_s)
            measured.open[rate] = run(lambda due=due: offer(server.port, requests, due))
        until_idle(server, sample)
    # Only what was measured to its end counts.
    measured.start_s.append(server.start_s)


def _memory_under_load(server: Server, target: Target, connections: int, seconds: float) -> int:
    """Bytes in the midst of a closed loop that is not counted."""
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(closed_loop, target, connections, seconds)
        time.sleep(seconds / 2)
        memory = server.memory_bytes()
        load.result()
    return memory


def until_idle(server: Server, sample: Sample) -> None:
    """Wait for a right answer. A load ends in the middle of requests, and a server without batching computes them
    all, one by one, though nobody waits any more: what is measured next would wait behind them.

    Raises:
        WrongAnswerError: another tensor than before the load.
        ServerError: none came in time.
    """
    until = time.monotonic() + _IDLE_TIMEOUT_S
    while True:
        try:
            return sample.check(0, ask(server.contender, server.port, sample.bodies[0], _IDLE_TIMEOUT_S))
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > until:
                raise ServerError(f"no answer after a load: {error}") from error
            time.sleep(0.1)


async def check_all(server: Server, requests: Sequence[bytes], sample: Sample, connections: int) -> None:
    """Ask everything once, with many requests at once, so that batches are checked too.

    Raises:
        WrongAnswerError: a number is off, or a request was not answered with 200.
    """
    waiting = iter(range(len(requests)))

    async def caller() -> None:
        connection = await Connection.connect(server.port)
        for index in waiting:
            if not connection.is_open:  # servers may close one after any answer
                connection = await Connection.connect(server.port)
            answer = await connection.ask(requests[index])
            if answer.status != 200:
                raise WrongAnswerError(f"status {answer.status}: {answer.body[:200]!r}")
            sample.check(index, server.contender.unwrap(answer.body))
        connection.close()

    async with asyncio.timeout(60):
        await asyncio.gather(*(caller() for _ in range(connections)))
