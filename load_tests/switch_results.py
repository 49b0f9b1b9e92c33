"""Rows of `engine_switches.py`, and what they look like for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from report import table

OFF, ON = "off", "on"
NEVER, ALWAYS, AUTO = "never", "always", "auto"
DECODE, PREFILL = "decode", "prefill"
LOCAL, SLOW, ELSEWHERE = "local", "slow", "elsewhere"
AUTO_LOSS, AUTO_SHORT = 0.03, 0.05
_EVEN = 0.03


@dataclass(frozen=True)
class Rate:
    """Throughput with one setting of a switch.

    Attributes:
        link: to the groups: "local", "slow" (every dispatch is delayed), or "elsewhere" (slow, and the groups
            simulated, on cores of their own).
        tokens_per_s: median over rounds.
        ratio: to the switch's first way; median over rounds of the ratio within each.
    """

    model: str
    phase: str
    link: str
    sequences: int
    way: str
    tokens_per_s: float
    ratio: float


@dataclass(frozen=True)
class Proof:
    """What requests answer alone and beside others, compared to the bit.

    Attributes:
        tokens_differ: requests with other tokens beside others.
        logprobs_differ: requests with any logprob, of the chosen token or an alternative, that is not the same
            float.
        first_tokens_differ: requests whose first token has other logprobs: what came before it is equal for sure.
    """

    model: str
    way: str
    requests: int
    tokens_differ: int
    logprobs_differ: int
    first_tokens_differ: int


@dataclass(frozen=True)
class Decided:
    """What `micro_batches="auto"` did in the measured rounds, and what it believed at their end."""

    model: str
    link: str
    sequences: int
    single: int
    double: int
    probes: int
    trunk_ms: float
    expert_ms: float
    link_ms: float
    predicted_gain: float
    measured_gain: float


@dataclass(frozen=True)
class Reuse:
    """Prefix reuse.

    Attributes:
        prefilled_tokens: computed, of all prompts of a round.
        first_token_p50_ms, seconds: of the requests that were asked together; until their last token.
        ratio: of `first_token_p50_ms` to "off"; median over rounds of the ratio within each.
        seconds_ratio: that of `seconds`.
    """

    model: str
    prompts: str
    prompt_tokens: int
    way: str
    prefilled_tokens: int
    first_token_p50_ms: float
    ratio: float
    seconds: float
    seconds_ratio: float


@dataclass(frozen=True)
class Budget:
    """Sequences that decode while long prompts prefill.

    Attributes:
        way: `max_step_tokens`, or "no prompts": nothing prefills beside them.
        between_p50_ms, between_p99_ms: from one token of a sequence to its next, meanwhile.
        ratio: of `between_p99_ms` to that of the smallest budget; median over rounds of the ratio within each.
        prompt_tokens_per_s, rate_ratio: of the long prompts, until the last has its first token.
        tokens_per_s: decoded beside them.
    """

    model: str
    prompt_tokens: int
    way: str
    between_p50_ms: float
    between_p99_ms: float
    ratio: float
    prompt_tokens_per_s: float
    rate_ratio: float
    tokens_per_s: float


@dataclass
class Results:
    """All that was measured."""

    invariance: list[Rate]
    proofs: list[Proof]
    micro_batches: list[Rate]
    decided: list[Decided]
    reuse: list[Reuse]
    budgets: list[Budget]


# For people ----------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    """A table for each kind of row that there is, and what is worse."""
    parts = [
        _rates("batch_invariant", results.invariance),
        _proofs(results.proofs),
        _rates("micro_batches", results.micro_batches),
        _decisions(results.decided),
        _reuse(results.reuse),
        _budgets(results.budgets),
        "\n".join(summary(results)),
    ]
    return "\n\n".join(part for part in parts if part)


def _rates(switch: str, rows: Sequence[Rate]) -> str:
    if not rows:
        return ""
    return table(
        f"{switch}: throughput",
        ("model", "phase", "link", "sequences", "way", "tokens/s", f"to {rows[0].way}"),
        [
            (r.model, r.phase, r.link, str(r.sequences), r.way, f"{r.tokens_per_s:,.0f}", f"{r.ratio:.2f}x")
            for r in rows
        ],
    )


def _proofs(rows: Sequence[Proof]) -> str:
    if not rows:
        return ""
    return table(
        "batch_invariant: requests that answer otherwise beside others than alone",
        ("model", "way", "requests", "other tokens", "other logprobs", "of the first token"),
        [
            (
                *(r.model, r.way, str(r.requests), str(r.tokens_differ), str(r.logprobs_differ)),
                str(r.first_tokens_differ),
            )
            for r in rows
        ],
    )


def _decisions(rows: Sequence[Decided]) -> str:
    if not rows:
        return ""
    header = ("model", "link", "sequences", "single", "double", "probes", "trunk ms", "experts ms", "link ms")
    return table(
        "micro_batches auto: steps as one batch and as two, and what it believed at the end",
        (*header, "predicted", "measured"),
        [
            (
                *(r.model, r.link, str(r.sequences), str(r.single), str(r.double), str(r.probes)),
                *(f"{r.trunk_ms:.1f}", f"{r.expert_ms:.1f}", f"{r.link_ms:.1f}"),
                *(f"{gain:.2f}x" if gain else "" for gain in (r.predicted_gain, r.measured_gain)),
            )
            for r in rows
        ],
    )


def _reuse(rows: Sequence[Reuse]) -> str:
    if not rows:
        return ""
    return table(
        "reuse_prefixes: first tokens, and tokens of prompts that were computed",
        ("model", "prompts", "tokens each", "way", "computed", "first token p50 ms", "to off", "all s", "to off"),
        [
            (
                *(r.model, r.prompts, str(r.prompt_tokens), r.way, f"{r.prefilled_tokens:,}"),
                *(_ms(r.first_token_p50_ms), f"{r.ratio:.2f}x", f"{r.seconds:.2f}", f"{r.seconds_ratio:.2f}x"),
            )
            for r in rows
        ],
    )


def _budgets(rows: Sequence[Budget]) -> str:
    if not rows:
        return ""
    header = ("model", "prompts", "budget", "between p50 ms", "p99 ms", "p99 to smallest", "prompt tokens/s")
    return table(
        "max_step_tokens: tokens of decoding sequences while long prompts prefill",
        (*header, "to smallest", "decoded/s"),
        [
            (
                *(r.model, str(r.prompt_tokens), r.way, _ms(r.between_p50_ms), _ms(r.between_p99_ms)),
                *(f"{r.ratio:.2f}x", f"{r.prompt_tokens_per_s:,.0f}" if r.prompt_tokens_per_s else ""),
                *(f"{r.rate_ratio:.2f}x" if r.prompt_tokens_per_s else "", f"{r.tokens_per_s:,.0f}"),
            )
            for r in rows
        ],
    )


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


# What is worse -------------------------------------------------------------------------------------------------


def summary(results: Results) -> list[str]:
    """What the switches cost, computed from the rows."""
    return [*_cost(results), *_auto(results.micro_batches), *_reuse_cost(results.reuse)]


def _cost(results: Results) -> Iterator[str]:
    on = [row for row in results.invariance if row.way == ON]
    if on:
        worst, best = min(on, key=lambda row: row.ratio), max(on, key=lambda row: row.ratio)
        yield f"batch_invariant keeps {worst.ratio:.2f}x ({_case(worst)}) to {best.ratio:.2f}x ({_case(best)})."
    broken = [row for row in results.proofs if row.way == ON and row.logprobs_differ + row.tokens_differ]
    if any(row.way == ON for row in results.proofs):
        where = ", ".join(f"{row.model}: {row.logprobs_differ} of {row.requests}" for row in broken)
        yield f"batch_invariant on: {'BROKEN for ' + where if broken else 'every answer is the same to the bit'}."


def _auto(rows: Sequence[Rate]) -> Iterator[str]:
    cases: dict[tuple[str, str, int], dict[str, Rate]] = {}
    for row in rows:
        cases.setdefault((row.model, row.link, row.sequences), {})[row.way] = row
    # One sequence cannot be split: its three ways are the same, and their ratios noise.
    whole = [case for case in cases.values() if len(case) == 3 and case[NEVER].sequences > 1]
    if not whole:
        return
    losing = [case[AUTO] for case in whole if case[AUTO].ratio < 1 - AUTO_LOSS]
    yield f"micro_batches auto loses more than {AUTO_LOSS:.0%} against never: {_listed(losing)}."
    short = [case[AUTO] for case in whole if case[AUTO].ratio < (1 - AUTO_SHORT) * _better(case)]
    yield f"It is more than {AUTO_SHORT:.0%} below the better of never and always: {_listed(short)}."
    paying = [case[ALWAYS] for case in whole if case[ALWAYS].ratio > 1 + _EVEN]
    yield f"always is faster than never by more than {_EVEN:.0%}: {_listed(paying)}."


def _better(case: dict[str, Rate]) -> float:
    return max(case[NEVER].ratio, case[ALWAYS].ratio)


def _reuse_cost(rows: Sequence[Reuse]) -> Iterator[str]:
    worse = [row for row in rows if row.way == ON and max(row.ratio, row.seconds_ratio) > 1 + _EVEN]
    if rows:
        listed = ", ".join(f"{r.model}, {r.prompts} ({r.ratio:.2f}x, {r.seconds_ratio:.2f}x)" for r in worse)
        yield f"reuse_prefixes on is slower by more than {_EVEN:.0%}: {listed or 'nowhere'}."


def _listed(rows: Iterable[Rate]) -> str:
    return "; ".join(f"{_case(row)} ({row.ratio:.2f}x)" for row in rows) or "nowhere"


def _case(row: Rate) -> str:
    link = "" if row.link == LOCAL else f", link {row.link}"
    return f"{row.model}, {row.phase} at {row.sequences}{link}"
