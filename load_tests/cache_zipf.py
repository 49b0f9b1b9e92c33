"""Hit ratio of the served cache where few requests are popular, beside the best that its size permits."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cache_requests import TENSOR_TOKENS, get_status, hidden_states
from cache_traces import zipf_trace
from pimoe.clients import AsyncClient
from pimoe.runtime.caching import CacheLimits, ResultCache
from pimoe.runtime.caching.result_cache import ENTRY_OVERHEAD_BYTES
from report import progress, table
from stand import Stand

SKEW = 1.0
_SEED = 7
_CLIENTS = 8


@dataclass(frozen=True)
class Size:
    """A cache: its policy, and its size as a share of the distinct requests."""

    policy: str
    share: float


@dataclass(frozen=True)
class Zipf:
    """One cache under the trace.

    Attributes:
        entries: how many answers it has room for.
        requests, distinct: in the trace.
        hits, coalesced, misses: as the gateway counted them; a coalesced one was computed for another, at the
            same moment.
        hit_ratio: hits and coalesced ones of all, measured.
        replayed: of the same policy and size, one request after the other, without serving.
        best: of whoever knows the future (Belady 1966), not obliged to store what comes.
    """

    policy: str
    share: float
    entries: int
    requests: int
    distinct: int
    hits: int
    coalesced: int
    misses: int
    hit_ratio: float
    replayed: float
    best: float
    requests_per_s: float


def make_trace(distinct: int, requests: int) -> list[int]:
    """The same in every run."""
    return [int(key) for key in zipf_trace(np.random.default_rng(_SEED), distinct, requests, SKEW)]


def measure_zipf(cluster: Stand, distinct: int, requests: int, sizes: Sequence[Size]) -> list[Zipf]:
    """Each cache in an application of its own, in place of the one before, asked over HTTP by pimoe's client."""
    trace = make_trace(distinct, requests)
    entry_bytes = _entry_bytes(cluster.url)
    found = []
    for size in sizes:
        entries = max(1, round(size.share * distinct))
        cache = {"policy": size.policy, "max_bytes": entries * entry_bytes}
        cluster.serve(None, 2, {"gateway": {"num_replicas": 1, "cache": cache}})
        progress(f"cache under Zipf: {requests} requests, {size.policy} with room for {entries} of {distinct}")
        found.append(_zipf(cluster.url, trace, size, entries, distinct))
    return found


def _entry_bytes(url: str) -> int:
    """What one answer counts in the cache: by how much it grows for new ones."""

    async def ask(client: AsyncClient, first: int) -> int:
        hidden = get_status(url)["model"]["hidden_size"]
        for seed in range(first, first + 8):
            await client.infer(hidden_states(TENSOR_TOKENS, hidden, 10**6 + seed))
        return int(get_status(url)["cache"]["bytes"])

    async def grown() -> int:
        async with AsyncClient(url) as client:
            before = await ask(client, 0)
            return (await ask(client, 8) - before) // 8

    return asyncio.run(grown())


def _zipf(url: str, trace: Sequence[int], size: Size, entries: int, distinct: int) -> Zipf:
    before = get_status(url)
    seconds = asyncio.run(_ask_all(url, trace, before["model"]["hidden_size"]))
    after = get_status(url)["cache"]
    hits, coalesced, misses = (after[name] - before["cache"][name] for name in ("hits", "coalesced", "misses"))
    if hits + coalesced + misses != len(trace):
        raise RuntimeError(f"{len(trace)} requests, but the gateways count {hits} + {coalesced} + {misses}")
    return Zipf(
        *(size.policy, size.share, entries, len(trace), distinct, hits, coalesced, misses),
        hit_ratio=(hits + coalesced) / len(trace),
        replayed=replayed_hits(trace, size.policy, entries) / len(trace),
        best=best_hits(trace, entries) / len(trace),
        requests_per_s=len(trace) / seconds,
    )


async def _ask_all(url: str, trace: Sequence[int], hidden: int) -> float:
    """In order, with a few clients; how long it took."""
    asked = iter(trace)
    arrays = {key: hidden_states(TENSOR_TOKENS, hidden, key) for key in set(trace)}
    async with AsyncClient(url) as client:

        async def ask() -> None:
            for key in asked:
                await client.infer(arrays[key])

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(_CLIENTS)))
        return time.perf_counter() - started


def replayed_hits(trace: Sequence[int], policy: str, entries: int) -> int:
    """Hits of pimoe's cache with room for so many equal answers."""
    size = entries * (ENTRY_OVERHEAD_BYTES + 1)
    cache: ResultCache[bool] = ResultCache(CacheLimits(size, size, policy=policy))
    hits = 0
    for number in trace:
        key = number.to_bytes(8, "little")
        if cache.get(key):
            hits += 1
        else:
            cache.put(key, True, 1)
    return hits


def best_hits(trace: Sequence[int], entries: int) -> int:
    """The most hits that any cache of so many entries can have: keep what is asked for again soonest, and do not
    store what is asked for again last of all (Belady, 1966, with the choice not to store)."""
    following = _next_uses(trace)
    kept: dict[int, int] = {}  # key -> when it is asked for next
    latest: list[tuple[int, int]] = []  # the same as a heap, latest first; what changed since is skipped
    hits = 0
    for position, key in enumerate(trace):
        hits += kept.pop(key, None) is not None
        if following[position] == len(trace):
            continue
        kept[key] = following[position]
        heapq.heappush(latest, (-following[position], key))
        while len(kept) > entries:
            negative, candidate = heapq.heappop(latest)
            if kept.get(candidate) == -negative:
                del kept[candidate]
    return hits


def _next_uses(trace: Sequence[int]) -> list[int]:
    """For each position, when its key is asked for next; the length of the trace where it is not."""
    following, seen = [len(trace)] * len(trace), dict[int, int]()
    for position in range(len(trace) - 1, -1, -1):
        following[position] = seen.get(trace[position], len(trace))
        seen[trace[position]] = position
    return following


# For people ----------------------------------------------------------------------------------------------------


def zipf_table(results: Sequence[Zipf]) -> str:
    """Measured, replayed, best possible."""
    first = results[0]
    title = f"Hit ratio over HTTP, Zipf {SKEW:g}: {first.requests:,} requests for {first.distinct:,} tensors"
    counts, ratios = ("hits", "coalesced", "computed"), ("hit ratio", "replayed", "best possible", "of it")
    header = ("policy", "room for", *counts, *ratios, "requests/s")
    rows = [
        (
            *(r.policy, f"{r.entries} ({r.share:.0%})", f"{r.hits:,}", f"{r.coalesced:,}", f"{r.misses:,}"),
            *(f"{100 * ratio:.1f}%" for ratio in (r.hit_ratio, r.replayed, r.best)),
            *(f"{r.hit_ratio / r.best:.2f}", f"{r.requests_per_s:,.0f}"),
        )
        for r in results
    ]
    return table(title, header, rows)


def curves(distinct: int, requests: int, policies: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Hit ratio over share, replayed by policy and the best, for a chart."""
    trace = make_trace(distinct, requests)
    shares = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    rooms = {share: max(1, round(share * distinct)) for share in shares}
    found: dict[str, list[tuple[float, float]]] = {
        "best possible": [(share, best_hits(trace, room) / requests) for share, room in rooms.items()]
    }
    for policy in policies:
        found[f"{policy}, replayed"] = [
            (share, replayed_hits(trace, policy, room) / requests) for share, room in rooms.items()
        ]
    return found


def worse_lines(results: Sequence[Zipf], by: float = 0.1) -> list[str]:
    """Where much is left to the best, or where serving loses against a replay."""
    return [
        f"under Zipf {r.policy} with room for {r.share:.0%} answers {100 * r.hit_ratio:.1f}% from the cache, "
        f"{100 * r.best:.1f}% are possible"
        for r in results
        if r.hit_ratio < (1 - by) * r.best
    ]


def as_points(results: Sequence[Zipf]) -> dict[str, list[tuple[float, float]]]:
    """What was measured, for a chart."""
    found: dict[str, list[tuple[float, float]]] = {}
    for r in sorted(results, key=lambda r: r.share):
        found.setdefault(f"{r.policy}, measured", []).append((r.share, r.hit_ratio))
    return found
