"""Which eviction policy keeps the right answers, how fast, and would a library do it better?

    python load_tests/cache_policies.py [--preset tiny] [--json FILE]

Every contender meets the same requests for the same entries, with the same number of bytes. See README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cache_contenders import Contender, Maker, Ours, contenders, weight
from cache_traces import PRESETS, Preset, Trace, make_traces
from pimoe.runtime.caching.eviction import POLICIES
from report import machine, machine_line, parser, progress, publish, table

WORSE_BY = 0.005  # of hit ratio; less is noise of hashing and of ties


@dataclass(frozen=True)
class Result:
    """One contender on one trace at one size.

    Attributes:
        ours: whether it is pimoe's.
        hit_ratio, byte_hit_ratio: of requests, and of the bytes that they asked for.
        requests_per_s: a look-up each, and storing what it did not find.
        peak: the most bytes ever held, over the bytes allowed.
    """

    trace: str
    share: float
    contender: str
    ours: bool
    hit_ratio: float
    byte_hit_ratio: float
    requests_per_s: float
    peak: float


@dataclass(frozen=True)
class AdaptiveResult:
    """A size that adapts, beside the fixed one that it may grow to.

    Attributes:
        size: the mean size, over the largest.
        hit_ratio, fixed_hit_ratio: of requests.
    """

    trace: str
    share: float
    policy: str
    size: float
    hit_ratio: float
    fixed_hit_ratio: float


# The measurement -----------------------------------------------------------------------------------------------


def measure(preset: Preset, makers: dict[str, Maker]) -> list[Result]:
    """All contenders on all traces at all sizes."""
    results = []
    for trace in make_traces(preset):
        progress(f"cache policies: {trace.name}")
        results += [_run(trace, share, name, maker) for share in preset.shares for name, maker in makers.items()]
    return results


def _run(trace: Trace, share: float, name: str, maker: Maker) -> Result:
    capacity = int(share * sum(map(weight, trace.sizes.values())))
    sizes, cache, hits, hit_bytes = trace.sizes, maker(capacity, False), 0, 0
    get, put = cache.get, cache.put
    started = time.perf_counter()
    for key in trace.keys:
        if get(key) is None:
            put(key, sizes[key])
        else:
            hits += 1
            hit_bytes += sizes[key]
    rate = len(trace.keys) / (time.perf_counter() - started)
    ratios = hits / len(trace.keys), hit_bytes / sum(sizes[key] for key in trace.keys)
    peak = _peak(trace, maker(capacity, True)) / capacity
    return Result(trace.name, share, name, name in POLICIES, *ratios, rate, peak)


def _peak(trace: Trace, cache: Contender) -> int:
    """The most bytes ever held, on the first part of a trace; apart, because asking for it takes time."""
    peak = 0
    for key in trace.keys[: len(trace.keys) // 4]:
        if cache.get(key) is None:
            cache.put(key, trace.sizes[key])
            peak = max(peak, cache.held_bytes())
    return peak


def measure_adaptive(preset: Preset, fixed: Sequence[Result]) -> list[AdaptiveResult]:
    """Sizes that adapt, where the largest of all shares may be had."""
    share = max(preset.shares)
    ratios = {(r.trace, r.contender): r.hit_ratio for r in fixed if r.share == share}
    results = []
    for trace in make_traces(preset):
        capacity = int(share * sum(map(weight, trace.sizes.values())))
        for policy in ("lru", "w-tinylfu"):
            ours, hits, size = Ours(policy, capacity, False, adapts=True), 0, 0
            for key in trace.keys:
                if ours.get(key) is None:
                    ours.put(key, trace.sizes[key])
                else:
                    hits += 1
                size += ours.cache.statistics().target_bytes
            asked = len(trace.keys)
            ratio = ratios[trace.name, policy]
            results.append(AdaptiveResult(trace.name, share, policy, size / asked / capacity, hits / asked, ratio))
    return results


# For people ----------------------------------------------------------------------------------------------------


def tables(results: Sequence[Result]) -> str:
    """Ratios by trace and size, speed and bounds by contender, and where others are better."""
    titles = {"hit_ratio": "Hit ratio, %", "byte_hit_ratio": "Byte hit ratio, %"}
    ratios = (_ratios(results, *title) for title in titles.items())
    return "\n\n".join([*ratios, _speeds(results), _worse(results)])


def _ratios(results: Sequence[Result], field: str, title: str) -> str:
    names = list(dict.fromkeys(r.contender for r in results))
    cells = {(r.trace, r.share, r.contender): f"{100 * getattr(r, field):.1f}" for r in results}
    places = dict.fromkeys((r.trace, r.share) for r in results)
    rows = [(f"{trace} @{share:.0%}", *(cells[trace, share, name] for name in names)) for trace, share in places]
    return table(title, ("trace @ share of its bytes", *names), rows)


def _speeds(results: Sequence[Result]) -> str:
    own = {name: [r for r in results if r.contender == name] for name in (r.contender for r in results)}
    speeds = {name: statistics.median(r.requests_per_s for r in runs) for name, runs in own.items()}
    rows = [
        (name, f"{speed:,.0f}", f"{speed / speeds['lru']:.2f}x", f"{max(r.peak for r in own[name]):.3f}")
        for name, speed in speeds.items()
    ]
    title = "Requests on one thread (median of all traces and sizes), and the most bytes held over those allowed"
    return table(title, ("contender", "requests/s", "to lru", "peak bytes"), rows)


def adaptive_table(results: Sequence[AdaptiveResult]) -> str:
    """What is kept with how much less room."""
    numbers = [(100 * r.size, 100 * r.hit_ratio, 100 * r.fixed_hit_ratio) for r in results]
    rows = [
        (f"{r.trace} @{r.share:.0%}", r.policy, *(f"{number:.1f}" for number in row))
        for r, row in zip(results, numbers, strict=True)
    ]
    title = "Adaptive size: the mean size in % of the largest, and hit ratios in %"
    return table(title, ("trace @ largest size", "policy", "mean size", "adaptive", "fixed at the largest"), rows)


def _worse(results: Sequence[Result]) -> str:
    """Places where a library keeps clearly more than the best of pimoe's, or than its policy of that name."""
    rows = []
    for place in dict.fromkeys((r.trace, r.share) for r in results):
        here = {r.contender: r.hit_ratio for r in results if (r.trace, r.share) == place}
        best = max(POLICIES, key=lambda name: here[name])
        for other in here.keys() - set(POLICIES):
            for name in {best, other.split()[-1]} & here.keys():
                if (gap := here[other] - here[name]) > WORSE_BY:
                    rows.append((f"{place[0]} @{place[1]:.0%}", name, other, f"{100 * gap:.1f}"))
    title = (
        "Where a library keeps more than pimoe's best, or than its policy of the same name (points of hit ratio)"
    )
    return table(title, ("trace @ size", "pimoe", "library", "points"), sorted(rows)) if rows else f"{title}: none"


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    here = machine(("cachetools", "cachebox", "moka-py"))
    makers, skipped = contenders()
    for library, reason in skipped.items():
        progress(f"cache policies: {library} is left out: {reason}")
    results = measure(PRESETS[options.preset], makers)
    progress("cache policies: adaptive sizes")
    adaptive = measure_adaptive(PRESETS[options.preset], results)
    facts = {
        "machine": here,
        "preset": options.preset,
        "skipped": skipped,
        "cache_policies": [asdict(result) for result in results],
        "adaptive_size": [asdict(result) for result in adaptive],
    }
    left_out = "".join(f"left out: {library} ({reason})\n" for library, reason in skipped.items())
    text = f"{machine_line(here)}\n{left_out}\n{tables(results)}\n\n{adaptive_table(adaptive)}"
    publish(facts, text, options.json)


if __name__ == "__main__":
    run(parser("Compare eviction policies and caching libraries.", PRESETS).parse_args())
