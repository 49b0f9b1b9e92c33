"""What came of a replayed trace: outcomes and waits by class, batches, overtaking."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from batching_replay import Batch, Outcome, Replay, Request, Service
from pimoe.runtime.batching import CLASS_NAMES, class_of
from report import quantile

ALL = "all"


@dataclass(frozen=True)
class ClassResult:
    """One class, or all of them, of one trace under one policy.

    Attributes:
        offered, offered_tokens: what arrived.
        in_time, in_time_tokens: the parts of them that were answered before their callers left: goodput.
        late, expired, refused: the parts of the requests that were computed in vain, given up for their deadlines
            before that, and turned away or shed for lack of room.
        wait_p50_s, wait_p99_s: from arrival until it began to be computed; None where nothing was.
        overtaken_s: the most by which something dispatched while a request waited on was younger than it.
    """

    trace: str
    policy: str
    class_name: str
    offered: int
    offered_tokens: int
    in_time: float
    in_time_tokens: float
    late: float
    expired: float
    refused: float
    wait_p50_s: float | None
    wait_p99_s: float | None
    overtaken_s: float


@dataclass(frozen=True)
class RunResult:
    """One trace under one policy: its batches.

    Attributes:
        load: offered tokens over capacity.
        mean_batch_tokens: of all batches.
        utilisation: part of the time, up to the last batch, in which experts were busy.
        goodput: tokens begun while the trace lasted and answered in time, over what could be computed meanwhile.
    """

    trace: str
    policy: str
    load: float
    batches: int
    mean_batch_tokens: float
    utilisation: float
    goodput: float
    longest_batch_s: float


def class_results(trace: str, policy: str, played: Replay) -> list[ClassResult]:
    """The classes that were there, most urgent first, after all of them together."""
    by_class: dict[str, list[Request]] = {ALL: played.requests}
    for rank in reversed(range(len(CLASS_NAMES))):
        found = [request for request in played.requests if class_of(request.arrival.priority) == rank]
        if found:
            by_class[CLASS_NAMES[rank]] = found
    overtaking = _Overtaking(played.batches)
    return [_class_result(trace, policy, name, found, overtaking) for name, found in by_class.items()]


def _class_result(
    trace: str, policy: str, class_name: str, requests: Sequence[Request], overtaking: _Overtaking
) -> ClassResult:
    outcomes: dict[str, int] = dict.fromkeys(get_args(Outcome), 0)
    for request in requests:
        if request.outcome is None:
            raise RuntimeError(f"{policy} has left a request of {trace} without an outcome")
        outcomes[request.outcome] += 1
    answered = [request for request in requests if request.outcome == "in time"]
    tokens = sum(request.arrival.tokens for request in requests)
    waits = [r.began_s - r.arrival.time_s for r in requests if math.isfinite(r.began_s)]
    return ClassResult(
        trace=trace,
        policy=policy,
        class_name=class_name,
        offered=len(requests),
        offered_tokens=tokens,
        in_time=len(answered) / len(requests),
        in_time_tokens=sum(request.arrival.tokens for request in answered) / tokens,
        **{name: outcomes[name] / len(requests) for name in ("late", "expired", "refused")},
        wait_p50_s=quantile(waits, 0.5) if waits else None,
        wait_p99_s=quantile(waits, 0.99) if waits else None,
        overtaken_s=max(overtaking.of(request) for request in requests),
    )


class _Overtaking:
    """By how much younger something may be that was served first."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._dispatched = [batch.dispatched_s for batch in batches]
        self._newest = list(accumulate((batch.newest_s for batch in batches), max))

    def of(self, request: Request) -> float:
        """The age by which the youngest that was dispatched while this one waited on is younger, at least 0."""
        before = bisect_left(self._dispatched, request.left_s)
        newest_s = self._newest[before - 1] if before else 0.0
        return max(0.0, newest_s - request.arrival.time_s)


def run_result(trace: str, policy: str, played: Replay, service: Service) -> RunResult:
    """See `RunResult`."""
    batches = played.batches
    lasted_s = max(request.arrival.time_s for request in played.requests)
    possible = service.capacity_tokens_per_s * lasted_s
    good = [r for r in played.requests if r.outcome == "in time" and r.began_s <= lasted_s]
    return RunResult(
        trace=trace,
        policy=policy,
        load=sum(request.arrival.tokens for request in played.requests) / possible,
        batches=len(batches),
        mean_batch_tokens=sum(batch.tokens for batch in batches) / len(batches),
        utilisation=sum(batch.seconds for batch in batches) / played.busy_until_s,
        goodput=sum(request.arrival.tokens for request in good) / possible,
        longest_batch_s=max(batch.seconds for batch in batches),
    )
