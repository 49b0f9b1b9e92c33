"""What `compare_serving.py` prints: rows for machines, tables and charts for people, targets reached or missed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from plot import Panel, Series, figure
from report import table, target, target_table
from serving_contenders import TOKENS, Contender
from serving_rounds import Measured

Row = dict[str, Any]


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
            "connections": connections,
            "requests_per_s": statistics.median(load.requests_per_s for load in loads),
            "p50_ms": statistics.median(load.p50_us for load in loads) / 1e3,
            "p99_ms": statistics.median(load.p99_us for load in loads) / 1e3,
            "errors": sum(load.failed for load in loads),
            "rounds": [round(load.requests_per_s, 1) for load in loads],
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


def target_rows(closed: Sequence[Row], ceiling_tokens_per_s: float) -> list[Row]:
    """What is promised, and what came of it; only where both sides were measured."""
    ours = {row["connections"]: row for row in closed if row["is_ours"]}
    default = {row["connections"]: row for row in closed if row["server"] == "serve"}
    rows = []
    for connections, row in ours.items():
        if connections == 1:
            alone = [other["p50_ms"] for other in closed if _is_batching_rival(other, 1)]
            if alone:
                name = "p50 at 1 connection, to the best batching rival"
                rows.append(target(name, row["p50_ms"] / min(alone), 0.7, at_most=True))
            continue
        if row["ratio"] is not None:
            name = f"requests/s at {connections} connections, to the best rival"
            rows.append(target(name, row["ratio"], 1.2))
        if connections in default:
            name = f"requests/s at {connections} connections, to @serve.batch with the default ingress"
            rows.append(target(name, row["requests_per_s"] / default[connections]["requests_per_s"], 5.0))
    if ours:
        best = max(row["requests_per_s"] for row in ours.values())
        name = "tokens/s, to the plain torch forward with all cores"
        rows.append(target(name, TOKENS * best / ceiling_tokens_per_s, 0.6))
    return rows


def _is_batching_rival(row: Row, connections: int) -> bool:
    return not row["is_ours"] and row["is_batching"] and row["connections"] == connections


def _measured(contenders: Sequence[Contender], found: Mapping[str, Measured]) -> list[tuple[Contender, Measured]]:
    pairs = [(contender, found[contender.key]) for contender in contenders if contender.key in found]
    return [pair for pair in pairs if pair[1].failed is None and pair[1].start_s]


# For people ------------------------------------------------------------------------------------------------------


def text(facts: Mapping[str, Any]) -> str:
    """All of it."""
    parts = [_closed_table(facts["closed"], connections) for connections in _levels(facts["closed"])]
    if facts["open"]:
        parts.append(_open_table(facts["open"]))
    parts.append(_server_table(facts["servers"]))
    if facts["targets"]:
        parts.append(target_table(facts["targets"], _target_title(facts["ceiling"])))
    skipped = [f"left out: {title}: {reason}"[:150] for title, reason in facts["skipped"].items()]
    parts.append("\n".join([*skipped, f"Load: {facts['load']}.", *worse(facts["closed"], facts["open"])]))
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


def _open_table(rows: Sequence[Row]) -> str:
    lines = [
        (
            f"{row['requests_per_s']:,.0f}",
            row["title"],
            *(str(row[name]) for name in ("offered", "answered", "refused", "late", "failed")),
            _ms(row["p50_ms"]),
            _ms(row["p99_ms"]),
        )
        for row in sorted(rows, key=lambda row: (row["requests_per_s"], row["p99_ms"] or float("inf")))
    ]
    header = ("requests/s", "server", "offered", "answered", "refused", "late", "failed", "p50", "p99")
    return table("Open loop, Poisson arrivals; latency from when a request was due", header, lines)


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
    """Requests/s and p50 over connections, and p99 over what was offered; SVG."""
    closed, opened = facts["closed"], facts["open"]
    panels = [
        Panel(
            "Requests/s", "connections", "requests/s", _series(closed, "connections", "requests_per_s"), x_log=True
        ),
        Panel("p50", "connections", "ms", _series(closed, "connections", "p50_ms"), x_log=True, y_log=True),
    ]
    if opened:
        points = _series(opened, "requests_per_s", "p99_ms")
        panels.append(Panel("p99, open loop", "requests/s offered", "ms", points, y_log=True))
    return figure("One MoE layer served", panels, columns=3)


def _series(rows: Sequence[Row], x: str, y: str) -> list[Series]:
    titles = dict.fromkeys(row["title"] for row in rows)
    return [
        Series(title, [(row[x], row[y]) for row in rows if row["title"] == title and row[y] is not None])
        for title in titles
    ]
