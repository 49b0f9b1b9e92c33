"""What `isolation_tax.py` reports, for machines and for people: speeds, a layer's parts, targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from generation_targets import target_of_rounds
from plot import Panel, Series, figure
from report import table

TARGET_PROCESSES = 2
TARGETS = {1: 0.6, 8: 0.9, 32: 0.9, 128: 1.0}


@dataclass(frozen=True)
class Speed:
    """Medians over rounds.

    Attributes:
        processes: of the groups; 0 in-process.
        tokens_per_s: while all sequences decode.
        ratio: to the fastest in-process way of the same round.
        lowest, highest: such ratios of single rounds.
        one, two: how many steps ran as one batch and as two micro-batches meanwhile.
    """

    weights: str
    sequences: int
    way: str
    processes: int
    tokens_per_s: float
    ratio: float
    lowest: float
    highest: float
    one: int
    two: int


@dataclass(frozen=True)
class Parts:
    """Medians over decoding steps of all sequences, each as one batch: microseconds of a layer (see
    `generation_split.StepTimes`), and milliseconds of a step: outside of its layers, and altogether."""

    weights: str
    sequences: int
    way: str
    attention_us: float
    gate_us: float
    plan_us: float
    link_us: float
    expert_us: float
    combine_us: float
    other_ms: float
    step_ms: float


@dataclass
class Results:
    """All that was found. `skipped`: what could not be measured, and why."""

    speeds: list[Speed] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def tables(results: Results) -> str:
    """Two for each kind of weights."""
    found = []
    for weights in dict.fromkeys(speed.weights for speed in results.speeds):
        found.append(_speeds_table(results, weights))
        found.append(_parts_table(results, weights))
    return "\n\n".join(found)


def _speeds_table(results: Results, weights: str) -> str:
    rows = [
        (
            *(str(s.sequences), s.way, f"{s.tokens_per_s:,.0f}", f"{s.ratio:.2f}x"),
            *(f"{s.lowest:.2f}x", f"{s.highest:.2f}x", f"{s.one:,}", f"{s.two:,}"),
        )
        for s in results.speeds
        if s.weights == weights
    ]
    header = ("sequences", "way", "tokens/s", "to best in-process", "lowest", "highest", "steps as one", "as two")
    return table(f"Isolation, {weights}: decoding", header, rows)


def _parts_table(results: Results, weights: str) -> str:
    header = ("sequences", "way", "attention", "gate", "plan", "link", "expert", "combine", "step ms", "other ms")
    return table(
        f"Isolation, {weights}: microseconds of a layer, in decoding steps that run as one batch",
        header,
        [(str(p.sequences), p.way, *_cells(p)) for p in results.parts if p.weights == weights],
    )


def _cells(parts: Parts) -> list[str]:
    layer = (parts.attention_us, parts.gate_us, parts.plan_us, parts.link_us, parts.expert_us, parts.combine_us)
    return [*(f"{us:,.0f}" for us in layer), f"{parts.step_ms:.2f}", f"{parts.other_ms:.2f}"]


def summary(results: Results) -> list[str]:
    """Every number of sequences at which isolation costs something."""
    lines = []
    for weights in dict.fromkeys(speed.weights for speed in results.speeds):
        worse = [
            f"{s.way} at {s.sequences} ({s.ratio:.2f}x)"
            for s in results.speeds
            if s.weights == weights and s.processes and s.ratio < 1
        ]
        lines.append(f"{weights}: slower than in-process: {', '.join(worse) or 'nothing'}.")
    return [*lines, *(f"Skipped: {weights}: {reason}." for weights, reason in results.skipped.items())]


def targets(speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """Of groups in two processes."""
    what = "decode, experts in two processes, {}, {} sequence(s), to in-process"
    return [
        target_of_rounds(what.format(s.weights, s.sequences), s.ratio, s.lowest, s.highest, TARGETS[s.sequences])
        for s in speeds
        if s.processes == TARGET_PROCESSES and s.sequences in TARGETS
    ]


def chart(speeds: Sequence[Speed]) -> str:
    """Tokens/s over sequences as SVG, a line for each way."""
    panels = []
    for weights in dict.fromkeys(speed.weights for speed in speeds):
        lines: dict[str, list[tuple[float, float]]] = {}
        for speed in (speed for speed in speeds if speed.weights == weights):
            lines.setdefault(speed.way, []).append((float(speed.sequences), speed.tokens_per_s))
        series = [Series(way, sorted(points)) for way, points in lines.items()]
        panels.append(Panel(f"decode, {weights}", "sequences", "tokens/s", series, x_log=True, y_log=True))
    return figure("Isolation: tokens per second", panels)
