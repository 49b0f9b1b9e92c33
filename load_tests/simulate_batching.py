"""How pimoe's batching does beside other batchers, on the same arrivals, in virtual time.

    python load_tests/simulate_batching.py [--preset tiny] [--json FILE] [--plot FILE.svg] [--trace FILE]

Nothing of pimoe's is written anew here: the `Batcher` itself runs, on an event loop whose clock jumps from one
event to the next. So do the others, of `batching_rivals.py`. See README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import arrivals as traces
from arrivals import Arrival
from batching_replay import OURS, POLICIES, Replay, Service, replay
from batching_results import ALL, ClassResult, RunResult, class_results, run_result
from pimoe.runtime.batching import CLASS_NAMES, class_of
from plot import Panel, Series, figure
from report import machine, machine_line, parser, progress, publish, table

OVERLOAD = "overload 2x"
# What differs by less is even: parts of what was offered; waits, in relation, or in full batches' time.
_EVEN = 0.02
_WAITS_EVEN = 0.1


@dataclass(frozen=True)
class Preset:
    """How much to simulate: seconds of each trace, and the loads of the curves."""

    duration_s: float
    loads: tuple[float, ...]


PRESETS = {
    "tiny": Preset(duration_s=3.0, loads=(0.5, 2.0)),
    "default": Preset(duration_s=30.0, loads=(0.2, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)),
}


@dataclass
class Results:
    """Of all traces and policies; `cdfs` are the quantiles of waits, at shares of all that was offered."""

    classes: list[ClassResult] = field(default_factory=list)
    runs: list[RunResult] = field(default_factory=list)
    curves: list[ClassResult] = field(default_factory=list)
    curve_runs: list[RunResult] = field(default_factory=list)
    distributions: dict[str, list[Series]] = field(default_factory=dict)


def synthetic(service: Service, duration_s: float) -> dict[str, list[Arrival]]:
    """The traces by name."""

    def made(shape: traces.Shape, loads: dict[traces.Workload, float]) -> list[Arrival]:
        most = service.batching.max_batch_tokens
        return traces.generate(shape, loads, service.capacity_tokens_per_s, duration_s, most)

    flood = {traces.INTERACTIVE: 1.2, traces.DEFAULT: 0.2, traces.BATCH: 0.2}
    tight = {
        replace(workload, timeout_s=workload.timeout_s / 5): load for workload, load in traces.mix(1.2).items()
    }
    return {
        "light 0.2x": made(traces.POISSON, traces.mix(0.2)),
        "Poisson 0.8x": made(traces.POISSON, traces.mix(0.8)),
        "bursts 0.8x": made(traces.BURSTS, traces.mix(0.8)),
        "heavy tails 0.8x": made(traces.HEAVY_TAILS, traces.mix(0.8)),
        OVERLOAD: made(traces.POISSON, traces.mix(2.0)),
        "tight deadlines 1.2x": made(traces.POISSON, tight),
        "heavy overload 2x": made(traces.HEAVY_TAILS, traces.mix(2.0)),
        "interactive flood 1.6x": made(traces.POISSON, flood),
    }


def simulate(service: Service, named: dict[str, list[Arrival]]) -> Results:
    """Replay every trace against every policy."""
    results = Results()
    for trace, arrivals in named.items():
        progress(f"{trace}: {len(arrivals)} requests")
        for policy in POLICIES:
            played = replay(policy, service, arrivals)
            results.classes += class_results(trace, policy, played)
            results.runs.append(run_result(trace, policy, played, service))
            _distribute(results, trace, policy, played)
    return results


def _distribute(results: Results, trace: str, policy: str, played: Replay) -> None:
    for name in ("interactive", "batch"):
        requests = [r for r in played.requests if CLASS_NAMES[class_of(r.arrival.priority)] == name]
        waits = sorted(r.began_s - r.arrival.time_s for r in requests if r.outcome == "in time")
        points = [(max(wait, 1e-3), (index + 1) / len(requests)) for index, wait in enumerate(waits)]
        thinned = points[:: max(1, len(points) // 200)] + points[-1:]
        results.distributions.setdefault(f"{trace}: {name}", []).append(Series(policy, thinned))


def sweep(service: Service, preset: Preset, results: Results) -> None:
    """The same mix at growing load."""
    for load in preset.loads:
        progress(f"Poisson at {load}x")
        loads, most = traces.mix(load), service.batching.max_batch_tokens
        arrivals = traces.generate(
            traces.POISSON, loads, service.capacity_tokens_per_s, preset.duration_s, most, seed=1
        )
        for policy in POLICIES:
            played = replay(policy, service, arrivals)
            results.curves += class_results(f"{load}", policy, played)
            results.curve_runs.append(run_result(f"{load}", policy, played, service))


# For people ----------------------------------------------------------------------------------------------------


def tables(results: Results, service: Service) -> str:
    """A table of each trace, and what of it speaks for pimoe and what against."""
    names = dict.fromkeys(run.trace for run in results.runs)
    return "\n\n".join([*(_trace_table(results, name) for name in names), summary(comparisons(results, service))])


def _trace_table(results: Results, trace: str) -> str:
    classes = {(r.policy, r.class_name): r for r in results.classes if r.trace == trace}
    present = [name for name in (ALL, *reversed(CLASS_NAMES)) if (OURS, name) in classes]
    header = ["policy", *(f"in time: {name}" for name in present), *(f"wait ms: {name}" for name in present[1:])]
    header += ["batch", "busy", "late", "expired", "refused", "overtaken s"]
    rows = []
    for run in results.runs:
        if run.trace == trace:
            found = [classes[run.policy, name] for name in present]
            every = found[0]
            row = [run.policy, *(f"{100 * r.in_time:.1f}%" for r in found), *(_waits(r) for r in found[1:])]
            row += [f"{run.mean_batch_tokens:.0f}", f"{100 * run.utilisation:.0f}%"]
            row += [f"{100 * share:.1f}%" for share in (every.late, every.expired, every.refused)]
            rows.append([*row, f"{every.overtaken_s:.1f}"])
    load = next(run.load for run in results.runs if run.trace == trace)
    offered = classes[OURS, ALL].offered
    return table(f"{trace}: {offered:,} requests, {load:.2f} of capacity", header, rows)


def _waits(result: ClassResult) -> str:
    if result.wait_p50_s is None or result.wait_p99_s is None:
        return "-"
    return f"{1000 * result.wait_p50_s:,.0f} / {1000 * result.wait_p99_s:,.0f}"


Verdict = Literal["wins", "even", "loses"]


@dataclass(frozen=True)
class Comparison:
    """pimoe beside one of the others, in one respect of one trace."""

    trace: str
    rival: str
    respect: str
    verdict: Verdict
    ours: str
    theirs: str


def comparisons(results: Results, service: Service) -> list[Comparison]:
    """Of every trace with every rival: what was answered in time, all in all, by class, and of the class that
    fares worst; p99 of waits by class. Waits are compared only where the other answers as much of the class: who
    serves fewer serves those sooner."""
    found: list[Comparison] = []
    for run in results.runs:
        if run.policy != OURS:
            ours, theirs = (_by_class(results, run.trace, policy) for policy in (OURS, run.policy))
            found += _compare(ours, theirs, service.full_batch_s)
    return found


def _by_class(results: Results, trace: str, policy: str) -> dict[str, ClassResult]:
    return {r.class_name: r for r in results.classes if (r.trace, r.policy) == (trace, policy)}


def _compare(
    ours: dict[str, ClassResult], theirs: dict[str, ClassResult], full_batch_s: float
) -> Iterator[Comparison]:
    mine, other = ours.pop(ALL), theirs.pop(ALL)

    def compared(respect: str, better_by: float, even: float, *texts: str) -> Comparison:
        verdict: Verdict = "even" if abs(better_by) <= even else "wins" if better_by > 0 else "loses"
        return Comparison(mine.trace, other.policy, respect, verdict, *texts)

    def in_time(respect: str, my_share: float, other_share: float) -> Comparison:
        return compared(
            f"{respect} in time",
            my_share - other_share,
            _EVEN,
            f"{100 * my_share:.0f}%",
            f"{100 * other_share:.0f}%",
        )

    yield in_time("tokens", mine.in_time_tokens, other.in_time_tokens)
    yield in_time("worst class", *(min(each.in_time for each in side.values()) for side in (ours, theirs)))
    for name, mine in ours.items():
        other = theirs[name]
        yield in_time(name, mine.in_time, other.in_time)
        if other.in_time >= mine.in_time - _EVEN and mine.wait_p99_s is not None and other.wait_p99_s is not None:
            even_s = _WAITS_EVEN * max(mine.wait_p99_s, other.wait_p99_s, full_batch_s)
            texts = _seconds(mine.wait_p99_s), _seconds(other.wait_p99_s)
            yield compared(f"{name} wait p99", other.wait_p99_s - mine.wait_p99_s, even_s, *texts)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def summary(compared: Sequence[Comparison]) -> str:
    """Where pimoe wins and where it does not, from the numbers."""
    kinds: tuple[Verdict, ...] = get_args(Verdict)
    lines = ["Where pimoe is better than the others and where it is not, pimoe's number first"]
    for trace in dict.fromkeys(each.trace for each in compared):
        lines.append(f"\n{trace}")
        for rival in POLICIES[1:]:
            here = [each for each in compared if (each.trace, each.rival) == (trace, rival)]
            for kind in ("wins", "loses"):
                texts = [f"{each.respect} {each.ours} : {each.theirs}" for each in here if each.verdict == kind]
                if texts:
                    lines.append(f"  {kind:5} against {rival}: " + "; ".join(texts))
            if here and all(each.verdict == "even" for each in here):
                lines.append(f"  even  with {rival}")
    rows = [
        [rival, *(str(sum(each.rival == rival and each.verdict == kind for each in compared)) for kind in kinds)]
        for rival in POLICIES[1:]
    ]
    return "\n".join(lines) + "\n\n" + table("pimoe in all of these respects", ("against", *kinds), rows)


def charts(results: Results) -> str:
    """Goodput and waits over load, and distributions of waits, as SVG."""
    runs = [(run.policy, float(run.trace), run.goodput) for run in results.curve_runs]
    waits = [
        (r.policy, float(r.trace), 1000 * r.wait_p99_s)
        for r in results.curves
        if r.class_name == "interactive" and r.wait_p99_s is not None
    ]
    panels = []
    x_label = "offered load / capacity"
    if runs:
        panels += [
            Panel("Goodput", x_label, "tokens answered in time / capacity", _lines(runs)),
            Panel("Interactive requests", x_label, "p99 of waits, ms", _lines(waits), y_log=True),
        ]
    names = [name for name in results.distributions if name.startswith(OVERLOAD)] or list(results.distributions)
    for name in names[:2]:
        lines = results.distributions[name]
        panels.append(Panel(name, "wait, s", "part answered in time", lines, x_log=True, steps=True))
    return figure("Batching policies on the same arrivals", panels)


def _lines(points: Iterable[tuple[str, float, float]]) -> list[Series]:
    found = list(points)
    return [Series(name, [(x, y) for policy, x, y in found if policy == name]) for name in POLICIES]


def recorded(service: Service, options: argparse.Namespace) -> list[Arrival]:
    """The trace that `options` name, as the service can take it."""
    try:
        arrivals = list(traces.split(traces.read(options.trace), service.batching.max_batch_tokens))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--trace: {error}") from error
    if options.load is None:
        return arrivals
    if not options.load > 0:
        raise SystemExit(f"--load is {options.load}; it must be above 0")
    return traces.at_load(arrivals, options.load, service.capacity_tokens_per_s)


def run(options: argparse.Namespace) -> None:
    """Simulate and publish."""
    here, preset, service = machine(), PRESETS[options.preset], Service()
    if options.trace:
        results = simulate(service, {options.trace.name: recorded(service, options)})
    else:
        results = simulate(service, synthetic(service, preset.duration_s))
        sweep(service, preset, results)
    if options.plot:
        options.plot.write_text(charts(results))
    facts = {
        "machine": here,
        "preset": options.preset,
        "service": {**asdict(service), "capacity_tokens_per_s": service.capacity_tokens_per_s},
        "runs": [asdict(each) for each in results.runs],
        "classes": [asdict(each) for each in results.classes],
        "comparisons": [asdict(each) for each in comparisons(results, service)],
        "curve_runs": [asdict(each) for each in results.curve_runs],
        "curves": [asdict(each) for each in results.curves],
    }
    publish(facts, f"{machine_line(here)}\n\n{tables(results, service)}", options.json)


def command_line() -> argparse.ArgumentParser:
    """The options of every load test, a recorded trace, and where to draw."""
    made = parser("Compare batching policies on the same arrivals, in virtual time.", PRESETS)
    made.add_argument("--trace", type=Path, metavar="FILE", help="replay this recorded trace instead (JSON lines)")
    made.add_argument(
        "--load", type=float, help="play the recorded trace so fast that it is so many times capacity"
    )
    made.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw goodput and waits there")
    return made


if __name__ == "__main__":
    run(command_line().parse_args())
