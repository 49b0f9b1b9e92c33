"""What `compare_serving.py` prints: rows for machines, tables and charts for people, targets worse or not.

What is promised is judged in `serving_targets.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from plot import Panel, Series, figure
from report import table, target_table
from serving_contenders import Contender
from serving_rounds import Measured

Row = dict[str, Any]

_MEASURED_CHARACTERS = 66
_ANSWERED = 0.97  # of what was offered: below, a p99 is of those that were lucky, and no point in a chart


def server_rows(contenders: Sequence[Contender], found: Mapping[str, Measured]) -> list[Row]:
    """How each was set up, how long it took to start, and its memory under load: medians over rounds."""
    return [
        {
            "server": contender.key,
            "title": contender.title,
            "version": contender.version(),
            "start_s": statistics.median(measured.start_s),
            "memory_mib": statistics.median(measured.memory_bytes) / 2**20,
            "workers": None if contender.is_ours else contender.workers,
            "threads": None if contender.is_ours else contender.threads,
            "note": contender.note,
        }
        for contender, measured in _measured(contenders, found)
    ]


def closed_rows(contenders: Sequence[Contender], found: Mapping[str, Measured]) -> list[Row]:
    """One for each server and number of connections; `ratio` is to the most requests/s of any rival there."""
    rows: list[Row] = [
        {
            "server": contender.key,
            "title": contender.title,
            "is_ours": contender.is_ours,
            "is_batching": contender.is_batching,
            "is_alone": contender.is_alone,
            "connections": connections,
            "requests_per_s": statistics.median(load.requests_per_s for load in loads),
            "p50_ms": statistics.median(load.p50_us for load in loads) / 1e3,
            "p99_ms": statistics.median(load.p99_us for load in loads) / 1e3,
            "errors": sum(load.failed for load in loads),
            "rounds": [round(load.requests_per_s, 1) for load in loads],
            "p50_rounds_ms": [load.p50_us / 1e3 for load in loads],
        }
        for contender, measured in _measured(contenders, found)
        for connections, loads in measured.rates().items()
    ]
    for row in rows:
        rivals = [other for other in rows if not other["is_ours"] and other["connections"] == row["connections"]]
        best = max((other["requests_per_s"] for other in rivals), default=0.0)
        row["ratio"] = row["requests_per_s"] / best if best else None
    return rows


def failures(contenders: Sequence[Contender], found: Mapping[str, Measured]) -> dict[str, str]:
    """Who has no rate, with the reason, of the whole server or at a number of connections."""
    told = {}
    for contender in contenders:
        measured = found[contender.key]
        if measured.failed is not None:
            told[contender.title] = f"failed: {measured.failed}"
        for connections, fault in measured.faults.items():
            told[f"{contender.title} at {connections} connections"] = f"failed: {fault}"
    return told


def open_rows(contenders: Sequence[Contender], found: Mapping[str, Measured]) -> list[Row]:
    """One for each server and rate."""
    return [
        {
            "server": contender.key,
            "title": contender.title,
            "is_ours": contender.is_ours,
            "requests_per_s": rate,
            "offered": loop.offered,
            "answered": loop.answered,
            "refused": loop.refused,
            "late": loop.late,
            "failed": loop.failed,
            "p50_ms": None if loop.p50_s is None else 1e3 * loop.p50_s,
            "p99_ms": None if loop.p99_s is None else 1e3 * loop.p99_s,
            "lag_p99_ms": 1e3 * loop.lag_p99_s,
        }
        for contender, measured in _measured(contenders, found)
        for rate, loop in measured.open.items()
    ]


def _measured(contenders: Sequence[Contender], found: Mapping[str, Measured]) -> list[tuple[Contender, Measured]]:
    pairs = [(contender, found[contender.key]) for contender in contenders if contender.key in found]
    return [pair for pair in pairs if pair[1].failed is None and pair[1].start_s]


# For people ------------------------------------------------------------------------------------------------------


def text(facts: Mapping[str, Any]) -> str:
    """All of it."""
    parts = [_closed_table(facts["closed"], connections) for connections in _levels(facts["closed"])]
    if facts["open"]:
        parts.append(_open_table(facts["open"], facts["open_s"]))
    parts.append(_server_table(facts["servers"]))
    # Reasons may be long; they are whole in the JSON.
    targets = [{**row, "measured": row["measured"][:_MEASURED_CHARACTERS]} for row in facts["targets"]]
    parts.append(target_table(targets, _target_title(facts["ceiling"])))
    skipped = [f"left out: {title}: {reason}"[:150] for title, reason in facts["skipped"].items()]
    told = [f"Load: {facts['load']}.", *facts["notes"], *worse(facts["closed"], facts["open"])]
    parts.append("\n".join([*skipped, *told]))
    return "\n\n".join(parts)


def _levels(rows: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(row["connections"] for row in rows))


def _closed_table(rows: Sequence[Row], connections: int) -> str:
    here = sorted((r for r in rows if r["connections"] == connections), key=lambda row: -row["requests_per_s"])
    lines = [
        (
            row["title"],
            f"{row['requests_per_s']:,.0f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
            f"{row['p50_ms']:.1f} ms",
            f"{row['p99_ms']:.1f} ms",
            str(row["errors"]),
        )
        for row in here
    ]
    title = f"Closed loop, {connections} connection{'s' if connections > 1 else ''}"
    return table(title, ("server", "requests/s", "to best rival", "p50", "p99", "errors"), lines)


def _open_table(rows: Sequence[Row], seconds: float) -> str:
    lines = [
        (
            f"{row['requests_per_s']:,.0f}",
            row["title"],
            *(str(row[name]) for name in ("offered", "answered", "refused", "late", "failed")),
            _ms(row["p50_ms"]),
            _ms(row["p99_ms"]),
            _ms(row["lag_p99_ms"]),
        )
        for row in sorted(rows, key=lambda row: (row["requests_per_s"], row["p99_ms"] or float("inf")))
    ]
    header = ("requests/s", "server", "offered", "answered", "refused", "late", "failed", "p50", "p99", "lag p99")
    title = (
        f"Open loop, Poisson arrivals, one sample of {seconds:g} s for each rate\n"
        "(latency from when a request was due; lag: how late the generator was to see that, its own part in it)"
    )
    return table(title, header, lines)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"


def _server_table(rows: Sequence[Row]) -> str:
    lines = [
        (
            row["title"],
            row["version"],
            f"{row['start_s']:.1f} s",
            f"{row['memory_mib']:,.0f} MiB",
            "" if row["workers"] is None else f"{row['workers']} x {row['threads']}",
            row["note"],
        )
        for row in rows
    ]
    header = ("server", "version", "first answer", "memory", "workers x threads", "set up")
    return table("Servers", header, lines)


def _target_title(ceiling: Mapping[str, float]) -> str:
    return f"Targets (plain torch forward, {ceiling['tokens']} tokens: {ceiling['tokens_per_s']:,.0f} tokens/s)"


def worse(closed: Sequence[Row], opened: Sequence[Row]) -> list[str]:
    """Where pimoe is behind somebody, by more than a twentieth."""
    lines = []
    for ours in (row for row in closed if row["is_ours"]):
        rivals = [r for r in closed if not r["is_ours"] and r["connections"] == ours["connections"]]
        where = f"at {ours['connections']} connections"
        for name, unit, factor in (
            ("requests_per_s", "requests/s", -1),
            ("p50_ms", "p50", 1),
            ("p99_ms", "p99", 1),
        ):
            if not rivals:
                continue
            best = min(rivals, key=lambda row: factor * row[name])
            ratio = (ours[name] / best[name]) ** factor if best[name] and ours[name] else 1.0
            if ratio > 1.05:
                lines.append(f"Worse: {unit} {where}: {best['title']} is {ratio:.2f} times as good as pimoe.")
    for ours in (row for row in opened if row["is_ours"]):
        rivals = [r for r in opened if not r["is_ours"] and r["requests_per_s"] == ours["requests_per_s"]]
        better = [r for r in rivals if r["answered"] == r["offered"] and r["p99_ms"] is not None]
        if better:
            best = min(better, key=lambda row: row["p99_ms"])
            if ours["p99_ms"] is None or ours["p99_ms"] > 1.05 * best["p99_ms"]:
                at = f"{ours['requests_per_s']:,.0f} requests/s offered"
                p99s = f"{best['title']} {_ms(best['p99_ms'])}, pimoe {_ms(ours['p99_ms']) or 'none'}"
                lines.append(f"Worse: p99 at {at}: {p99s}.")
    if not any(row["is_ours"] for row in closed):
        return ["pimoe was not measured."]
    return lines or ["pimoe is nowhere behind a rival by more than a twentieth."]


def charts(facts: Mapping[str, Any]) -> str:
    """Requests/s and p50 over connections, and p99 over what was offered where it was answered; SVG."""
    closed = [row for row in facts["closed"] if not row["is_alone"]]
    opened = [row for row in facts["open"] if row["answered"] >= _ANSWERED * row["offered"]]
    panels = [
        Panel(
            "Requests/s", "connections", "requests/s", _series(closed, "connections", "requests_per_s"), x_log=True
        ),
        Panel("p50", "connections", "ms", _series(closed, "connections", "p50_ms"), x_log=True, y_log=True),
    ]
    if opened:
        points = _series(opened, "requests_per_s", "p99_ms")
        x_label = f"requests/s offered, where {_ANSWERED:.0%} were answered"
        panels.append(Panel("p99, open loop", x_label, "ms", points, y_log=True))
    return figure("One MoE layer served", panels, columns=3)


def _series(rows: Sequence[Row], x: str, y: str) -> list[Series]:
    titles = dict.fromkeys(row["title"] for row in rows)
    return [
        Series(title, [(row[x], row[y]) for row in rows if row["title"] == title and row[y] is not None])
        for title in titles
    ]
