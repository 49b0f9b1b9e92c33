"""The public reference shape of expert services: one layer, 64 tokens of 2048 in bfloat16, 8 experts, top-8.

A published service of single experts reports p50 16.7 ms, p95 22.4 ms and 3,784 routed tokens/s for it, on a host
with an A100. Its inner size is not known; ours is that of Qwen3-30B-A3B, whose hidden size is 2048 too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from dispatch_cluster import IN_PROCESS, deployed
from dispatch_echo import HANDLE, LANE, LINK
from pimoe.runtime.model.layer_model import write_layer_model
from report import cores, median_quantile, progress, table

TOKENS, HIDDEN, EXPERTS, TOP_K, GROUPS = 64, 2048, 8, 8, 2
PUBLISHED = "published, A100 host"
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class ReferencePreset:
    """How much to measure.

    Attributes:
        inner: inner size of each expert (SwiGLU).
        warm_up, calls: one after the other, per round and way.
    """

    inner: int = 768
    rounds: int = 2
    warm_up: int = 10
    calls: int = 100


@dataclass(frozen=True)
class ReferenceResult:
    """One way.

    Attributes:
        p50_ms, p95_ms: of a call, medians over rounds of each round's quantile.
        tokens_per_s: routed tokens of a call over its mean time, all rounds together.
        to_in_process: p50 over that in-process; None for what was not measured here.
    """

    way: str
    p50_ms: float
    p95_ms: float
    tokens_per_s: float
    to_in_process: float | None


def measure_reference(preset: ReferencePreset) -> list[ReferenceResult]:
    """In a cluster that runs; what was published comes last."""
    progress(f"dispatch: the reference shape, inner size {preset.inner}")
    threads = cores()
    ways = {
        f"{IN_PROCESS}, {threads} threads": (IN_PROCESS, threads),
        f"{LANE}, {GROUPS} processes": (LANE, 1),
        f"{LINK}, {GROUPS} processes": (LINK, 1),
        f"{HANDLE}, {GROUPS} processes": (HANDLE, 1),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        model = write_reference(Path(folder), preset.inner)
        with deployed("reference", model, GROUPS, GROUPS, whole=True, echoes=False) as router:
            for index in range(preset.rounds):
                progress(f"dispatch: the reference shape, round {index + 1} of {preset.rounds}")
                for name, (way, own_threads) in ways.items():
                    answer = router.experts.remote(way, TOKENS, preset.calls, preset.warm_up, own_threads)
                    times[name].append(answer.result(timeout_s=_TIMEOUT_S))
    base = median_quantile(times[next(iter(ways))], 0.5)
    return [*(_result(name, rounds, base) for name, rounds in times.items()), published()]


def published() -> ReferenceResult:
    """What the other service reports of itself."""
    return ReferenceResult(PUBLISHED, 16.7, 22.4, 3784.0, None)


def write_reference(folder: Path, inner: int) -> Path:
    """The layer as a checkpoint; random weights, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    shapes = {"gate_proj": (inner, HIDDEN), "up_proj": (inner, HIDDEN), "down_proj": (HIDDEN, inner)}
    experts = [{f"{name}.weight": weight(*shape) for name, shape in shapes.items()} for _ in range(EXPERTS)]
    return write_layer_model(folder / "layer", weight(EXPERTS, HIDDEN), experts, TOP_K)


def _result(way: str, rounds: Sequence[Sequence[float]], base: float) -> ReferenceResult:
    p50, p95 = median_quantile(rounds, 0.5), median_quantile(rounds, 0.95)
    spent, calls = sum(map(sum, rounds)), sum(map(len, rounds))
    return ReferenceResult(way, 1e3 * p50, 1e3 * p95, TOKENS * calls / spent, p50 / base)


def reference_table(results: Sequence[ReferenceResult], preset: ReferencePreset) -> str:
    """For people."""
    title = (
        f"The reference shape: {TOKENS} tokens x {HIDDEN} in bfloat16, {EXPERTS} experts top-{TOP_K}, SwiGLU of "
        f"inner size {preset.inner}\n({preset.warm_up} calls to warm up, {preset.calls} one after the other, "
        f"{preset.rounds} rounds. Published: another machine, perhaps another inner size)"
    )
    rows = [
        (
            *(r.way, f"{r.p50_ms:,.1f}", f"{r.p95_ms:,.1f}", f"{r.tokens_per_s:,.0f}"),
            "" if r.to_in_process is None else f"{r.to_in_process:.2f}x",
        )
        for r in results
    ]
    return table(title, ("way", "p50 ms", "p95 ms", "routed tokens/s", "p50 to in-process"), rows)


def reference_worse(results: Sequence[ReferenceResult]) -> list[str]:
    """Where being apart costs, or what was published is faster."""
    lines = [
        f"the reference shape over {r.way} takes {r.to_in_process:.2f}x as long as in-process (p50)"
        for r in results
        if r.way.startswith((LANE, LINK)) and r.to_in_process is not None and r.to_in_process > 1
    ]
    there = next(r for r in results if r.way == PUBLISHED)
    return lines + [
        f"the reference shape, {r.way}: p50 {r.p50_ms:.1f} ms, published {there.p50_ms:.1f} ms (an A100 host)"
        for r in results
        if r.way.startswith((LANE, LINK)) and r.p50_ms > there.p50_ms
    ]
