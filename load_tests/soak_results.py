"""What the soak's samples come to: trends, tables and charts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from plot import Panel, Series, figure
from process_usage import Usage
from report import quantile, table, target_table
from soak_drift import MEBIBYTE, Trend, trend
from soak_work import TIMED, Outcome

Samples = Mapping[int, Sequence[tuple[float, Usage]]]

_OF_PROCESSES: dict[str, Callable[[Usage], float]] = {
    "rss_bytes": lambda used: used.rss_bytes,
    "descriptors": lambda used: used.descriptors,
    "threads": lambda used: used.threads,
}
_QUANTILES = {"p50_ms": 0.5, "p99_ms": 0.99}


def trends_of(
    names: Mapping[int, str], samples: Samples, outcomes: Sequence[Outcome], started: float, window_s: float
) -> list[Trend]:
    """Of every process that was there from beginning to end, and of every kind of request that is timed."""
    last = max((len(series) for series in samples.values()), default=0)
    found = []
    for pid, series in samples.items():
        if len(series) < last - 1:
            continue  # Ray's idle workers come and go
        times = [at for at, _ in series]
        for quantity, read in _OF_PROCESSES.items():
            found.append(trend(names[pid], quantity, times, [read(used) for _, used in series]))
    for kind in TIMED:
        for quantity, points in latencies(kind, outcomes, started, window_s).items():
            if points:
                found.append(trend(kind, quantity, *zip(*points, strict=True)))
    return found


def latencies(
    kind: str, outcomes: Sequence[Outcome], started: float, window_s: float
) -> dict[str, list[tuple[float, float]]]:
    """Quantiles in ms over windows, by name: time of the window's middle in s, and value. Of what was answered:
    `soak_verdict` judges how much was not."""
    windows: dict[int, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.kind == kind and outcome.ended == "done":
            windows[int((outcome.due_s - started) // window_s)].append(1e3 * outcome.latency_s)
    return {
        name: [((index + 0.5) * window_s, quantile(windows[index], share)) for index in sorted(windows)]
        for name, share in _QUANTILES.items()
    }


def tables(facts: Mapping[str, Any], trends: Sequence[Trend]) -> str:
    """For people."""
    cache = ", ".join(f"{name} {value:,}" for name, value in facts["cache"].items())
    intro = (
        f"Soak: {facts['soak_s'] / 60:.1f} minutes at {facts['offered_per_s']:.0f} requests/s, capacity "
        f"{facts['capacity_per_s']:.0f}; cache: {cache}; never sent: {facts['dropped']}"
    )
    counts = [tuple(map(str, row.values())) for row in facts["outcomes"]]
    header = ("kind", "done", "refused", "late", "failed")
    verdict = "; ".join(facts["against"]) or "nothing of pimoe's drifts, fails or goes unanswered"
    if not facts["judged"]:
        verdict += " (too short to judge drifts)"
    of_processes = _trend_table("Processes: level and growth over the run", _OF_PROCESSES, trends)
    of_requests = _trend_table("Latencies: level and growth over the run", _QUANTILES, trends)
    judged = target_table(facts["targets"])
    return "\n\n".join([table(intro, header, counts), of_processes, of_requests, judged, f"Verdict: {verdict}"])


_UNITS = {"rss_bytes": ("RSS MiB", MEBIBYTE), "p50_ms": ("p50 ms", 1), "p99_ms": ("p99 ms", 1)}


def _trend_table(title: str, quantities: Iterable[str], trends: Sequence[Trend]) -> str:
    """A row for each subject; what is allowed to grow is in parentheses."""
    kept = {(each.subject, each.quantity): each for each in trends if each.quantity in quantities}
    header = ["subject"]
    for quantity in quantities:
        header += [_UNITS.get(quantity, (quantity, 1))[0], "grew (allowed)"]
    rows = []
    for subject in dict.fromkeys(subject for subject, _ in kept):
        found = [kept[subject, quantity] for quantity in quantities]
        cells = [cell for each in found for cell in _trend_cells(each)]
        rows.append([subject[:40], *cells, ", ".join(each.quantity for each in found if each.drifts)])
    return table(title, [*header, "drifts"], rows)


def _trend_cells(found: Trend) -> tuple[str, str]:
    scale = _UNITS.get(found.quantity, ("", 1))[1]
    return f"{found.level / scale:.1f}", f"{found.growth / scale:+.1f} ({found.bound / scale:.1f})"


def charts(
    names: Mapping[int, str],
    samples: Samples,
    outcomes: Sequence[Outcome],
    started: float,
    window_s: float,
    own: set[int],
) -> str:
    """An SVG of pimoe's own processes and of the latencies, over minutes."""

    def of_processes(title: str, unit: str, read: Callable[[Usage], float]) -> Panel:
        lines = [
            Series(names[pid], [(at / 60, read(used)) for at, used in samples[pid]])
            for pid in own
            if pid in samples
        ]
        return Panel(title, "minutes", unit, lines)

    by_kind = {kind: latencies(kind, outcomes, started, window_s) for kind in TIMED}

    def of_requests(quantity: str) -> Panel:
        lines = [Series(kind, [(at / 60, ms) for at, ms in by_kind[kind][quantity]]) for kind in TIMED]
        return Panel(f"Latency, {quantity.removesuffix('_ms')}", "minutes", "ms", lines)

    panels = [
        of_processes("Memory", "MiB (RSS)", lambda used: used.rss_bytes / MEBIBYTE),
        of_processes("File descriptors", "open", lambda used: used.descriptors),
        *(of_requests(quantity) for quantity in _QUANTILES),
    ]
    return figure("Soak: mixed work at 80% load", panels)
