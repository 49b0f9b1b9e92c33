"""What speaks against the application after a soak: drifts, ends, failures, and requests without an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from process_usage import Usage
from report import target
from soak_drift import Trend
from soak_work import SHARES, Outcome

MOST_UNANSWERED = 0.01  # of what was offered
# Their share may grow by so much from the first third of the run to the last, or by three standard errors.
MOST_GROWTH, _ERRORS = 0.002, 3.0
_UNANSWERED = ("refused", "late")
_HAPROXY = "haproxy"
_JUDGED = {
    "memory": ("rss_bytes",),
    "descriptors": ("descriptors",),
    "threads": ("threads",),
    "latency": ("p50_ms", "p99_ms"),
}


@dataclass
class Record:
    """What was seen. Times are seconds since the start of what counts, those of requests on `time.monotonic()`.

    Attributes:
        started: on `time.monotonic()`.
        samples: by process id.
        names: of processes, by id.
        dropped: when requests were due that were never sent, as too many were still unanswered.
    """

    started: float
    outcomes: list[Outcome] = field(default_factory=list)
    samples: dict[int, list[tuple[float, Usage]]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    dropped: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Unanswered:
    """Requests that were refused, late or never sent.

    Attributes:
        offered: all that were due.
        grew: their share in the last third of the run less that in the first.
        may_grow: so much is none.
    """

    offered: int
    refused: int
    late: int
    dropped: int
    grew: float
    may_grow: float

    @property
    def share(self) -> float:
        """Of what was offered."""
        return (self.refused + self.late + self.dropped) / max(1, self.offered)


def unanswered_of(outcomes: Sequence[Outcome], dropped: Sequence[float]) -> Unanswered:
    """Count them, and whether they become more."""
    due = sorted([(o.due_s, o.ended in _UNANSWERED) for o in outcomes] + [(at, True) for at in dropped])
    third = len(due) // 3
    first, last = (_share(part) for part in (due[:third], due[len(due) - third :]))
    both = (first + last) / 2
    error = (2 * both * (1 - both) / max(1, third)) ** 0.5
    counts = Counter(outcome.ended for outcome in outcomes)
    may_grow = max(MOST_GROWTH, _ERRORS * error)
    return Unanswered(len(due), counts["refused"], counts["late"], len(dropped), last - first, may_grow)


def _share(requests: Sequence[tuple[float, bool]]) -> float:
    return sum(unanswered for _, unanswered in requests) / max(1, len(requests))


def verdicts(trends: Sequence[Trend], record: Record, own: set[int], judges: bool) -> list[str]:
    """What speaks against the application; empty: nothing. Drifts and requests without an answer only where the
    run is long enough to judge them (`judges`)."""
    against = [f"{name} ended, or was replaced" for name in _gone(record, own)]
    failures = Counter(o.ended for o in record.outcomes if o.ended.startswith("failed"))
    against += [f"{count} requests {ended}" for ended, count in failures.most_common(10)]
    if judges:
        against += [
            f"{trend.subject}: {trend.quantity} drifts" for trend in _judged(trends, record, own) if trend.drifts
        ]
        against += _against_answers(unanswered_of(record.outcomes, record.dropped))
    return against


def _against_answers(found: Unanswered) -> list[str]:
    against = []
    if found.share > MOST_UNANSWERED:
        counts = f"{found.refused:,} refused, {found.late:,} late, {found.dropped:,} never sent"
        against.append(f"{found.share:.1%} of {found.offered:,} requests got no answer in time ({counts})")
    if found.grew > found.may_grow:
        against.append(f"requests without an answer in time became more, by {100 * found.grew:.1f} points")
    return against


def target_rows(trends: Sequence[Trend], record: Record, own: set[int], judges: bool) -> list[dict[str, Any]]:
    """The same as targets; not judged where the run is too short."""
    judged = _judged(trends, record, own)
    rows = [_drift_row(name, [t for t in judged if t.quantity in kinds]) for name, kinds in _JUDGED.items()]
    found = unanswered_of(record.outcomes, record.dropped)
    share, most = 100 * found.share, 100 * MOST_UNANSWERED
    grew, may_grow = 100 * found.grew, round(100 * found.may_grow, 2)
    broken = len(_gone(record, own)) + sum(o.ended.startswith("failed") for o in record.outcomes)
    rows += [
        target("soak, answers: requests refused, late or never sent", share, most, at_most=True, unit="%"),
        target("soak, answers: that share, last third less first", grew, may_grow, at_most=True, unit=" points"),
        target("soak, answers: requests that failed, processes that ended", broken, 0, True, unit="", digits=0),
    ]
    return rows if judges else [{**row, "reached": None} for row in rows]


def _drift_row(name: str, trends: Sequence[Trend]) -> dict[str, Any]:
    worst = max(trends, key=lambda trend: trend.excess, default=None)
    excess = 0.0 if worst is None else max(0.0, worst.excess)
    of = "" if worst is None or not excess else f" (most: {worst.subject}, {worst.quantity})"
    return target(f"soak, {name}: growth over what is allowed{of}", excess, 1.0, at_most=True)


def _judged(trends: Iterable[Trend], record: Record, own: set[int]) -> list[Trend]:
    # HAProxy replaces itself when it is configured anew, but it must not drift.
    names = {record.names[pid] for pid in own} | {_HAPROXY}
    return [trend for trend in trends if trend.subject in names or trend.subject in SHARES]


def _gone(record: Record, own: set[int]) -> list[str]:
    last_s = max((samples[-1][0] for samples in record.samples.values()), default=0.0)
    return [record.names[pid] for pid in own if _is_gone(record, pid, last_s)]


def _is_gone(record: Record, pid: int, last_s: float) -> bool:
    samples = record.samples.get(pid)
    return not samples or samples[-1][0] < last_s
