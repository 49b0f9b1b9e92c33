"""What `compare_generation.py` reports, for machines and for people: tables, targets, where pimoe is worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from generation import BFLOAT16, INT8
from plot import Panel, Series, figure
from report import table, target

DECODE, PREFILL = "decode", "prefill"
SERVED, TRANSFORMERS, LLAMA = "served over HTTP", "transformers", "llama.cpp"
TARGETS = {BFLOAT16: 1.5, INT8: 2.0}
_BETTER_BY = 1.05


@dataclass(frozen=True)
class Rate:
    """Medians over rounds. The ratios are medians, too, of the ratio within each round.

    Attributes:
        weights: of pimoe's experts in this table; transformers is always in bfloat16.
        tokens_per_s: generated ones while all sequences decode, or ones of prompts until all have a first token.
        to_transformers, to_llama: times as fast as these; None: it did not take part.
    """

    weights: str
    phase: str
    sequences: int
    way: str
    tokens_per_s: float
    to_transformers: float
    to_llama: float | None


@dataclass(frozen=True)
class Agreement:
    """Tokens that are the same as those of transformers, up to the first in each sequence that is not."""

    weights: str
    sequences: int
    way: str
    same: int
    of: int
    same_first: int
    answers: int


def tables(rates: Sequence[Rate], agreements: Sequence[Agreement], titles: Mapping[str, str]) -> str:
    """One for each kind of weights and phase, whose `titles` say what was asked for."""
    same = {(a.weights, a.sequences, a.way): f"{a.same / a.of:.0%}" for a in agreements}
    header = ("sequences", "way", "tokens/s", "to transformers", "to llama.cpp")
    parts = []
    for weights, phase in dict.fromkeys((rate.weights, rate.phase) for rate in rates):
        decodes = phase == DECODE
        rows = [
            (*_cells(rate), *([same.get((weights, rate.sequences, rate.way), "")] if decodes else ()))
            for rate in rates
            if (rate.weights, rate.phase) == (weights, phase)
        ]
        name = f"Generation, {weights}, {titles[phase]}"
        parts.append(table(name, (*header, "same tokens") if decodes else header, rows))
    return "\n\n".join(parts)


def _cells(rate: Rate) -> tuple[str, ...]:
    to_llama = "" if rate.to_llama is None else f"{rate.to_llama:.2f}x"
    return str(rate.sequences), rate.way, f"{rate.tokens_per_s:,.0f}", f"{rate.to_transformers:.2f}x", to_llama


def summary(
    rates: Sequence[Rate],
    agreements: Sequence[Agreement],
    choices: Sequence[Mapping[str, Any]],
    skipped: Mapping[str, str],
) -> list[str]:
    """How transformers computed, whose tokens agree, and where pimoe is worse."""
    lines = [f"transformers' fastest way: {_chosen(choices)}."]
    for weights in dict.fromkeys(agreement.weights for agreement in agreements):
        mine = [agreement for agreement in agreements if agreement.weights == weights]
        first, answers = sum(a.same_first for a in mine), sum(a.answers for a in mine)
        lines.append(
            f"{weights}: first tokens equal to transformers': {first:,} of {answers:,}; same tokens: up to the "
            "first other one, where rounding tips the balance and both go on from different texts."
        )
    lines += _worse(rates)
    return [*lines, *(f"Skipped: {way}: {reason}." for way, reason in skipped.items())]


def _chosen(choices: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for phase in (DECODE, PREFILL):
        mine = [choice for choice in choices if choice["phase"] == phase]
        ways = [f"{c['sequences']}: {c['experts']}, {c['threads']} threads" for c in mine]
        parts.append(f"{phase} {'; '.join(ways)}")
    return ". ".join(parts)


def targets(rates: Sequence[Rate]) -> list[dict[str, Any]]:
    """Of the served application, decoding."""
    what = "decode, served, experts in two processes, {}, {} sequence(s), to transformers in-process"
    return [
        target(what.format(rate.weights, rate.sequences), rate.to_transformers, TARGETS[rate.weights])
        for rate in rates
        if (rate.phase, rate.way) == (DECODE, SERVED) and rate.weights in TARGETS
    ]


def _worse(rates: Sequence[Rate]) -> Iterator[str]:
    """Against the served application, by at least a twentieth."""
    for weights in dict.fromkeys(rate.weights for rate in rates):
        mine = [rate for rate in rates if rate.weights == weights]
        served = {(r.phase, r.sequences): r.tokens_per_s for r in mine if r.way == SERVED}
        for way in dict.fromkeys(rate.way for rate in mine if rate.way != SERVED):
            better = [
                f"{r.phase} at {r.sequences} ({r.tokens_per_s / served[r.phase, r.sequences]:.1f}x)"
                for r in mine
                if r.way == way and r.tokens_per_s >= _BETTER_BY * served[r.phase, r.sequences]
            ]
            yield f"{weights}: {way} is faster than served in: {', '.join(better) or 'nothing'}."


def chart(rates: Sequence[Rate]) -> str:
    """Tokens/s over sequences as SVG, a line for each way."""
    panels = []
    for weights, phase in dict.fromkeys((rate.weights, rate.phase) for rate in rates):
        lines: dict[str, list[tuple[float, float]]] = {}
        for rate in rates:
            if (rate.weights, rate.phase) == (weights, phase):
                way = LLAMA if rate.way.startswith(LLAMA) else rate.way
                lines.setdefault(way, []).append((float(rate.sequences), rate.tokens_per_s))
        series = [Series(way, sorted(points)) for way, points in lines.items()]
        panels.append(Panel(f"{phase}, {weights}", "sequences", "tokens/s", series, x_log=True, y_log=True))
    return figure("Generation: tokens per second", panels)
