"""What `compare_serving.py` promises, judged: every promise has its row, whoever could not be measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report import target
from serving_contenders import TOKENS, Contender

Row = dict[str, Any]

_ROUNDS = {"requests_per_s": "rounds", "p50_ms": "p50_rounds_ms"}


@dataclass(frozen=True)
class Promise:
    """A ratio of pimoe to the best of some rivals.

    Attributes:
        rivals: whose best is taken, of those that were measured.
        column: of the closed loop's rows; less of a p50 is better, more of a rate.
    """

    what: str
    connections: int
    rivals: Sequence[Contender]
    wanted: float
    column: str = "requests_per_s"

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.column == "p50_ms"


def promises(everybody: Sequence[Contender], levels: Iterable[int]) -> list[Promise]:
    """Those about rivals, for numbers of connections."""
    rivals = [one for one in everybody if not one.is_ours]
    batching = [one for one in rivals if one.is_batching]
    many = [one for one in rivals if not one.is_alone]
    default = [one for one in many if one.rival == "serve"]
    found = []
    for count in levels:
        if count == 1:
            found.append(Promise("p50 at 1 connection, to the best batching rival", 1, batching, 0.7, "p50_ms"))
        else:
            where = f"requests/s at {count} connections, to"
            found.append(Promise(f"{where} the best rival", count, many, 1.2))
            found.append(Promise(f"{where} @serve.batch default", count, default, 5.0))
    return found


def target_rows(
    everybody: Sequence[Contender],
    closed: Sequence[Row],
    levels: Sequence[int],
    ceiling_tokens_per_s: float,
    skipped: Mapping[str, str],
) -> list[Row]:
    """What is promised, and what came of it. Missed where pimoe failed; not judged where no rival was measured, or
    pimoe was not asked for.

    Args:
        everybody: who could have been measured; rivals that were not are counted.
        closed: `serving_tables.closed_rows`.
        levels: numbers of connections.
        skipped: reasons by title, or by "title at N connections".
    """
    rows = [_judged(promise, everybody, closed, skipped) for promise in promises(everybody, levels)]
    return [*rows, _ceiling_row(everybody, closed, levels, ceiling_tokens_per_s, skipped)]


def _judged(
    promise: Promise, everybody: Sequence[Contender], closed: Sequence[Row], skipped: Mapping[str, str]
) -> Row:
    here = {row["server"]: row for row in closed if row["connections"] == promise.connections}
    ours = next(one for one in everybody if one.is_ours)
    if ours.key not in here:
        why = _why(ours, promise.connections, skipped)
        return _without_ours(promise.what, promise.wanted, why, promise.at_most)
    measured = [here[one.key] for one in promise.rivals if one.key in here]
    if not measured:
        reasons = {_why(one, promise.connections, skipped) or "not asked for" for one in promise.rivals}
        told = f"not measured: {reasons.pop() if len(reasons) == 1 else 'no rival was'}"
        return _unjudged(promise.what, promise.wanted, told, None, promise.at_most)
    best = (min if promise.at_most else max)(measured, key=lambda row: row[promise.column])
    ratio = here[ours.key][promise.column] / best[promise.column]
    row = target(promise.what, ratio, promise.wanted, promise.at_most)
    column = _ROUNDS[promise.column]
    # Who is set up for 1 connection takes part in the first rounds only.
    rounds = zip(here[ours.key][column], best[column], strict=False)
    row["measured"] += _range([mine / theirs for mine, theirs in rounds if theirs])
    if len(promise.rivals) > 1:
        row["measured"] += f" of {best['title']}; {len(measured)} of {len(promise.rivals)} rivals"
    return {**row, "rival": best["server"], "rivals_measured": len(measured), "rivals": len(promise.rivals)}


def _ceiling_row(
    everybody: Sequence[Contender],
    closed: Sequence[Row],
    levels: Sequence[int],
    ceiling_tokens_per_s: float,
    skipped: Mapping[str, str],
) -> Row:
    what, wanted = "tokens/s, to the plain torch forward with all cores", 0.6
    ours = [row for row in closed if row["is_ours"]]
    if not ours:
        pimoe = next(one for one in everybody if one.is_ours)
        reasons = [why for count in levels if (why := _why(pimoe, count, skipped)) is not None]
        return _without_ours(what, wanted, reasons[0] if reasons else None)
    best = max(ours, key=lambda row: row["requests_per_s"])
    row = target(what, TOKENS * best["requests_per_s"] / ceiling_tokens_per_s, wanted)
    row["measured"] += _range([TOKENS * rate / ceiling_tokens_per_s for rate in best["rounds"]])
    return row


def _why(contender: Contender, connections: int, skipped: Mapping[str, str]) -> str | None:
    """Why it has no row there; None: nobody asked for it."""
    return skipped.get(contender.title) or skipped.get(f"{contender.title} at {connections} connections")


def _without_ours(what: str, wanted: float, why: str | None, at_most: bool = False) -> Row:
    if why is None:
        return _unjudged(what, wanted, "not measured: pimoe was not asked for", None, at_most)
    return _unjudged(what, wanted, f"pimoe {why}", False, at_most)


def _unjudged(what: str, wanted: float, measured: str, reached: bool | None, at_most: bool = False) -> Row:
    """A promise without a ratio."""
    return {**target(what, 0.0, wanted, at_most), "measured": measured, "value": None, "reached": reached}


def _range(rounds: Sequence[float]) -> str:
    return f" ({min(rounds):.2f} to {max(rounds):.2f})" if len(rounds) > 1 else ""
