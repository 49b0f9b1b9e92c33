"""Time to first token of short prompts while long ones prefill: mixed prompts, a closed loop, streaming.

    python load_tests/mixed_prompts.py [--preset tiny] [--concurrency 32] [--way WAY] [--json FILE]

A Qwen3-MoE with random weights behind the default deployment, over HTTP. Prompts of 16 to 1,500 tokens,
log-uniform, come from as many clients as `--concurrency` says, each of which asks again as soon as it is answered.
Then the same requests in the same order meet the same application with whole prompts in a step (chunking off), and
transformers' continuous batching; and to know what the long ones cost, the short ones alone meet the first. See
README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from generation import over_http
from mixed_rivals import transformers_batching
from mixed_workload import SHORT, Preset, Result, Totals, closed_loop, results, totals_of, workload
from pimoe.clients import AsyncClient
from pimoe.runtime.loop_thread import new_event_loop
from random_model import Shape, write_random_model
from report import machine, machine_line, parser, progress, publish, table, target, target_table
from stand import Stand, stand, supervised

SERVED, WHOLE, ALONE, TRANSFORMERS = "served", "served, whole prompts", "served, short only", "transformers"
WAYS = (SERVED, ALONE, WHOLE, TRANSFORMERS)
GROUPS = 2
TARGET_RATIO = 3.0
_NO_CHUNKS = {"max_step_tokens": 1 << 20}
_PEAKS = ("running", "preempted", "queue.items", "kv_bytes", "kv_blocks.held", "kv_blocks.total")
_WATCH_S = (0.02, 0.5)

_TINY = Shape(64, 2, num_experts=4, top_k=2, expert_size=64, num_heads=2, num_kv_heads=1, dtype="float32")
PRESETS = {
    "tiny": Preset(16, 8, short_tokens=64, long_tokens=256, max_tokens=(4, 8), rival_requests=16, shape=_TINY),
    "default": Preset(),
}


# The ways ------------------------------------------------------------------------------------------------------


async def _engine(client: AsyncClient) -> dict[str, float]:
    """The numbers of the router's engine."""
    [router] = (await client.status())["routers"]
    return dict(_numbers(router["statistics"]["engine"]))


def _numbers(page: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in page.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


Measured = tuple[list[Result], Totals]


async def _watch(client: AsyncClient, peaks: dict[str, float]) -> None:
    pause_s, longest_s = _WATCH_S  # often at first: a small load is over before the longest pause
    while True:
        page = await _engine(client)
        for name in _PEAKS:
            peaks[name] = max(peaks.get(name, 0.0), page.get(name, 0.0))
        await asyncio.sleep(pause_s)
        pause_s = min(longest_s, 2 * pause_s)


async def _served(way: str, preset: Preset, url: str) -> Measured:
    peaks: dict[str, float] = {}
    # Other prompts than before at the same application, which would know their beginnings.
    requests = workload(preset, seed=1, short_only=True) if way == ALONE else workload(preset)
    async with AsyncClient(url) as client:
        before = await _engine(client)
        watcher = asyncio.create_task(_watch(client, peaks))
        answered = await closed_loop(over_http(client), requests, preset)
        watcher.cancel()
        after = await _engine(client)
    rose = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return results(way, answered, preset), totals_of(way, answered, preset, rose, peaks)


async def _rival(preset: Preset, folder: Path) -> Measured:
    preset = replace(preset, requests=preset.rival_requests)
    with transformers_batching(folder, preset.step_tokens, preset.kv_tokens) as generate:
        first = replace(preset, requests=1)
        await closed_loop(generate, workload(first, seed=2), first)  # its first steps prepare much
        answered = await closed_loop(generate, workload(preset), preset)
    return results(TRANSFORMERS, answered, preset), totals_of(TRANSFORMERS, answered, preset, {}, {})


def _with(engine: dict[str, int]) -> dict[str, Any]:
    return {"router": {"engine": engine}}


def _run(work: Any) -> Measured:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        measured: Measured = runner.run(work)
        return measured


def measure(
    preset: Preset, cluster: Stand, ways: Sequence[str], step_tokens: int | None = None
) -> Iterator[Measured]:
    """One way after the other; the model is made on the spot. `step_tokens`: None is the application's default."""
    engine = {} if step_tokens is None else {"max_step_tokens": step_tokens}
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        folder = write_random_model(Path(made), preset.shape)
        if SERVED in ways or ALONE in ways:
            cluster.serve(folder, GROUPS, _with(engine))
        for way in (way for way in (SERVED, ALONE) if way in ways):
            progress(f"mixed prompts: {way}")
            yield _run(_served(way, preset, cluster.url))
        if WHOLE in ways:
            cluster.serve(folder, GROUPS, _with(_NO_CHUNKS))
            progress(f"mixed prompts: {WHOLE}")
            yield _run(_served(WHOLE, preset, cluster.url))
        if TRANSFORMERS in ways:
            progress(f"mixed prompts: {TRANSFORMERS}")
            yield _run(_rival(preset, folder))


# For people ----------------------------------------------------------------------------------------------------


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def tables(measured: list[Measured], preset: Preset) -> str:
    """Latencies, throughput, and where another way is better than the served one."""
    rows = [row for results, _ in measured for row in results]
    sums = [totals for _, totals in measured]
    low, high = preset.prompt_tokens
    latency = table(
        f"Mixed prompts, {low} to {high:,} tokens, {preset.concurrency} clients; short: at most "
        f"{preset.short_tokens} tokens, long: at least {preset.long_tokens}",
        ("prompts", "way", "requests", "first token p50 ms", "p99 ms", "p99/p50", "between p50 ms", "p99 ms"),
        [
            (
                *(row.prompts, row.way, str(row.requests), _ms(row.ttft_p50_ms), _ms(row.ttft_p99_ms)),
                *(f"{row.ratio:.2f}x", _ms(row.itl_p50_ms), _ms(row.itl_p99_ms)),
            )
            for row in sorted(rows, key=lambda row: row.prompts, reverse=True)
        ],
    )
    throughput = table(
        "Throughput",
        ("way", "requests/s", "prompt tokens/s", "output tokens/s"),
        [
            (
                *(t.way, f"{t.requests_per_s:.2f}"),
                *(f"{t.prompt_tokens_per_s:,.0f}", f"{t.output_tokens_per_s:,.0f}"),
            )
            for t in sums
        ],
    )
    steps = table(
        "Steps of the router's engine, and its KV cache",
        ("way", "steps", "mean ms", "prompt tokens/step", "as two", "KV blocks, peak", "of", "preemptions"),
        [_steps(t) for t in sums if t.engine],
    )
    judged = [target_table(found)] if (found := targets(measured)) else []
    return "\n\n".join([latency, throughput, steps, *judged, "\n".join(summary(measured))])


def _steps(totals: Totals) -> tuple[str, ...]:
    engine, peaks = totals.engine, totals.peaks
    steps = engine["steps"]
    sizes = f"{1e3 * engine['step_s'] / steps:.0f}", f"{engine['prefill_tokens'] / steps:.0f}"
    counts = engine["micro_batches.double"], peaks["kv_blocks.held"], peaks["kv_blocks.total"]
    return totals.way, f"{steps:,.0f}", *sizes, *(f"{n:,.0f}" for n in (*counts, engine["preemptions"]))


def targets(measured: list[Measured]) -> list[dict[str, Any]]:
    """Whether an unlucky short prompt waits no longer than it is to; nothing where it was not served."""
    what = "first token of short prompts among long ones, served: p99 to p50"
    rows = [row for results, _ in measured for row in results if (row.way, row.prompts) == (SERVED, SHORT)]
    return [target(what, row.ratio, TARGET_RATIO, at_most=True) for row in rows]


def summary(measured: list[Measured]) -> list[str]:
    """The headline, and every respect in which another way is better by a tenth."""
    found = {row.way: row for rows, _ in measured for row in rows if row.prompts == SHORT}
    lines = []
    if SERVED in found:
        ratio = found[SERVED].ratio
        verdict = "within" if ratio <= TARGET_RATIO else "ABOVE"
        beside = next(totals.beside_long for _, totals in measured if totals.way == SERVED)
        lines.append(
            f"First token of short prompts, served: p99 is {ratio:.2f}x the median, {verdict} {TARGET_RATIO:g}x; "
            f"{beside:.0%} of them waited beside a long one."
        )
    if SERVED in found and ALONE in found:
        cost = found[SERVED].ttft_p50_ms / found[ALONE].ttft_p50_ms
        lines.append(f"Beside long prompts their median is {cost:.1f}x what it is among themselves.")
    return [*lines, *_worse(measured)]


def _respects(results: list[Result], totals: Totals) -> Iterator[tuple[str, float, bool]]:
    """Name, value, whether more is better."""
    for row in results:
        for name in ("ttft_p50_ms", "ttft_p99_ms", "ratio", "itl_p50_ms", "itl_p99_ms"):
            yield f"{name} of {row.prompts} prompts", getattr(row, name), False
    yield "requests_per_s", totals.requests_per_s, True


def _worse(measured: list[Measured]) -> Iterator[str]:
    own = next((m for m in measured if m[1].way == SERVED), None)
    for other in measured:
        if own is None or other is own or other[1].way == ALONE:
            continue
        pairs = zip(_respects(*own), _respects(*other), strict=True)
        worse = [
            f"{name} ({theirs / ours if more else ours / theirs:.1f}x)"
            for (name, ours, more), (_, theirs, _) in pairs
            if (theirs > 1.1 * ours if more else ours > 1.1 * theirs)
        ]
        yield f"{other[1].way} is better in: {', '.join(worse) or 'nothing'}."


# The command line ----------------------------------------------------------------------------------------------


def facts_of(measured: list[Measured]) -> dict[str, Any]:
    """For machines."""
    return {
        "mixed_prompts": [asdict(row) for rows, _ in measured for row in rows],
        "mixed_totals": [asdict(totals) for _, totals in measured],
        "mixed_summary": summary(measured),
        "targets": targets(measured),
    }


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    preset, here = PRESETS[options.preset], machine(("transformers",))
    if options.concurrency is not None:
        preset = replace(preset, concurrency=options.concurrency)
    with stand() as cluster:
        measured = list(measure(preset, cluster, options.way or WAYS, options.step_tokens))
    facts = {"machine": here, "preset": options.preset, **facts_of(measured)}
    publish(facts, f"{machine_line(here)}\n\n{tables(measured, preset)}", options.json)


if __name__ == "__main__":
    command_line = parser("Measure the first token of short prompts while long ones prefill.", PRESETS)
    command_line.add_argument("--concurrency", type=int, help="clients (the preset's: 32)")
    command_line.add_argument("--step-tokens", type=int, help="prompt tokens of a step when served (its default)")
    command_line.add_argument("--way", action="append", choices=WAYS, help="only these; may be repeated")
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
