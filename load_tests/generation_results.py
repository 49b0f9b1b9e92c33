"""What `compare_generation.py` reports, for machines and for people: tables, targets, where pimoe is worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from generation import BFLOAT16, INT8
from generation_targets import target_of_rounds
from plot import Panel, Series, figure
from report import table

DECODE, PREFILL = "decode", "prefill"
SERVED, TRANSFORMERS, LLAMA = "served over HTTP", "transformers", "llama.cpp"
QUIET = "transformers, before the cluster started"
TARGETS = {BFLOAT16: 1.5, INT8: 2.0}
# Of first tokens: not all, since two logits of a random model may be as good as equal.
LEAST_AGREEMENT = 0.7
_BETTER_BY = 1.05


@dataclass(frozen=True)
class Rate:
    """Medians over rounds. The ratios are medians, too, of the ratio within each round.

    Attributes:
        weights: of pimoe's experts in this table; transformers is always in bfloat16.
        tokens_per_s: generated ones while all sequences decode, or ones of prompts until all have a first token.
        to_transformers, to_llama: times as fast as these in the same round; None: it did not take part.
        to_quiet: times as fast as transformers' median before the cluster started.
        to_faster: the one of `to_transformers` and `to_quiet` that is to the faster of both.
        lowest, highest: ratios of single rounds to that.
    """

    weights: str
    phase: str
    sequences: int
    way: str
    tokens_per_s: float
    to_transformers: float
    to_quiet: float
    to_faster: float
    lowest: float
    highest: float
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


@dataclass(frozen=True)
class Rival:
    """What was measured with.

    Attributes:
        title, version: of the package.
        weights: as its file keeps them.
        file_bytes: of that.
        features: of processors, and others, that it was built to use, or found.
    """

    title: str
    version: str
    weights: str
    file_bytes: int
    features: str


def rival_of(about: Mapping[str, Any], weights: str) -> Rival:
    """From what llama.cpp says of itself when it is ready: `CPU : AVX = 1 | AVX2 = 0 | ...`."""
    parts = (part.rpartition(":")[2].partition("=") for part in about["system"].split("|"))
    features = " ".join(
        name.strip() if value.strip() == "1" else f"{name.strip()}={value.strip()}"
        for name, _, value in parts
        if name.strip() and value.strip() not in ("", "0")
    )
    return Rival("llama-cpp-python", about["version"], weights, about["bytes"], features)


def tables(rates: Sequence[Rate], agreements: Sequence[Agreement], titles: Mapping[str, str]) -> str:
    """One for each kind of weights and phase, whose `titles` say what was asked for."""
    same = {(a.weights, a.sequences, a.way): f"{a.same / a.of:.0%}" for a in agreements}
    header = (
        "sequences",
        "way",
        "tokens/s",
        "to transformers",
        "to it before",
        "lowest",
        "highest",
        "to llama.cpp",
    )
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
    ratios = (rate.to_transformers, rate.to_quiet, rate.lowest, rate.highest)
    return str(rate.sequences), rate.way, f"{rate.tokens_per_s:,.0f}", *(f"{x:.2f}x" for x in ratios), to_llama


def summary(
    rates: Sequence[Rate],
    agreements: Sequence[Agreement],
    choices: Sequence[Mapping[str, Any]],
    rivals: Sequence[Rival],
    skipped: Mapping[str, str],
) -> list[str]:
    """How transformers and llama.cpp computed, whose tokens agree, and where pimoe is worse."""
    lines = [
        f"transformers' fastest way: {_chosen(choices)}.",
        "Targets, lowest and highest are to the faster of transformers in the same rounds and before the cluster "
        "started.",
    ]
    lines += _described(rivals)
    for weights in dict.fromkeys(agreement.weights for agreement in agreements):
        mine = [agreement for agreement in agreements if agreement.weights == weights]
        first, answers = sum(a.same_first for a in mine), sum(a.answers for a in mine)
        lines.append(
            f"{weights}: first tokens equal to transformers': {first:,} of {answers:,}; same tokens: up to the "
            "first other one, where rounding tips the balance and both go on from different texts."
        )
    lines += _worse(rates)
    return [*lines, *(f"Skipped: {way}: {reason}." for way, reason in skipped.items())]


def _described(rivals: Sequence[Rival]) -> Iterator[str]:
    """A line for each package and its features, with all files that it read."""
    files: dict[tuple[str, str], list[str]] = {}
    for one in rivals:
        same = files.setdefault((f"{one.title} {one.version}", one.features), [])
        same.append(f"{one.weights} file of {one.file_bytes:,} bytes")
    for (name, features), read in files.items():
        yield f"{LLAMA}: {name}; {', '.join(read)}; {features}."


def _chosen(choices: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for phase in (DECODE, PREFILL):
        mine = [choice for choice in choices if choice["phase"] == phase]
        ways = [f"{c['sequences']}: {c['experts']}, {c['threads']} threads" for c in mine]
        parts.append(f"{phase} {'; '.join(ways)}")
    return ". ".join(parts)


def targets(rates: Sequence[Rate], agreements: Sequence[Agreement]) -> list[dict[str, Any]]:
    """Of the served application, decoding. Speed counts only where what is generated is right."""
    wrong = {weights: _disagreement(agreements, weights) for weights in TARGETS}
    what = "decode, served, experts in two processes, {}, {} sequence(s), to transformers in-process"
    return [
        target_of_rounds(
            what.format(rate.weights, rate.sequences),
            *(rate.to_faster, rate.lowest, rate.highest, TARGETS[rate.weights]),
            wrong[rate.weights],
        )
        for rate in rates
        if (rate.phase, rate.way) == (DECODE, SERVED) and rate.weights in TARGETS
    ]


def _disagreement(agreements: Sequence[Agreement], weights: str) -> str | None:
    """Why the served application's tokens cannot be trusted; None where they can. Of all numbers of sequences
    together: one sequence has a first token a round."""
    mine = [one for one in agreements if (one.weights, one.way) == (weights, SERVED)]
    first, answers = sum(one.same_first for one in mine), sum(one.answers for one in mine)
    if not answers:
        return "no tokens were compared"
    if first < LEAST_AGREEMENT * answers:
        return f"first tokens as transformers': {first:,} of {answers:,}, below {LEAST_AGREEMENT:.0%}"
    return None


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
