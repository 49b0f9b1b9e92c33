"""`pimoe status`: the page of `/admin/status` as tables that fit 80 columns, once or as a live view.

What waits and what became of it comes first: a live view is cut at the bottom where a terminal is too low for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..clients import Client, PimoeClientError
from .totals import add_up, quantile

_QUEUES = (("tensors", "batcher"), ("generation", "engine"))
_COUNTS = ("refused", "shed", "expired", "cancelled")
# What asks for the state of things rather than for answers; this view asks once for every look.
_WATCHERS = ("/admin/status", "/metrics", "/health", "/v2/ready", "/v2/live")

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def show_status(client: Client, console: Console) -> None:
    """What runs where, what waits, what the cache did; once."""
    console.print(status_view(client.status()))


def watch_status(
    client: Client,
    console: Console,
    interval_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """The same as a live table until interrupted. An application that does not answer is shown as such; it may
    come back."""
    with Live(console=console, auto_refresh=False) as live:
        before: tuple[dict[str, Any], float] | None = None
        while True:
            try:
                status, now = client.status(), clock()
                rates = "" if before is None else rates_line(before[0], status, now - before[1])
                live.update(status_view(status, rates), refresh=True)
                before = status, now
            except PimoeClientError as error:
                live.update(Text(f"[{error.code}] {error.message}", style="red"), refresh=True)
            sleep(interval_s)


def status_view(status: Mapping[str, Any], rates: str = "") -> Group:
    """The page of `/admin/status`, and a line of rates if any."""
    parts: list[Any] = []
    if status["routers"]:
        lines = (rates, *_batch_lines(status), *_generation_lines(status), *_cache_lines(status["cache"]))
        parts += [queue_table(status), *(Text(line) for line in lines if line), Text()]
    else:
        parts.append(Text("no router answers yet", style="red"))
    refused = [Text(line, style="red") for line in _refused_lines(status)]
    return Group(*parts, replica_table(status), *refused)


def queue_table(status: Mapping[str, Any]) -> Table:
    """What waits and what became of the rest, by queue and class; classes that nobody used are left out."""
    table = Table(
        title="queues; counts and waits since start",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("", min_width=13, no_wrap=True)
    for column in ("waiting", "tokens", "p50 wait", "p99 wait", *_COUNTS):
        table.add_column(column, justify="right", no_wrap=column in _COUNTS, min_width=6)
    for kind, name in _QUEUES:
        parts = [router["statistics"][name] for router in status["routers"]]
        classes = add_up([part["queue"]["classes"] for part in parts if part is not None])
        if classes:
            table.add_row(kind, *_queue_row(add_up(list(classes.values()))), style="bold")
        for label, books in reversed(classes.items()):
            if sum(books["waits"]["counts"]) or any(books[count] for count in ("items", *_COUNTS)):
                table.add_row(f"  {label}", *_queue_row(books))
    return table


def _queue_row(books: Mapping[str, Any]) -> list[str]:
    waits = [_bound_text(books["waits"], share) for share in (0.5, 0.99)]
    return [short(books["items"]), short(books["tokens"]), *waits, *(short(books[count]) for count in _COUNTS)]


def _bound_text(waits: Mapping[str, Any], share: float) -> str:
    seconds = quantile(waits, share)
    if seconds is None:
        return ""
    if math.isinf(seconds):
        return f">{waits['bounds'][-1]:g} s"
    return f"<{seconds:g} s" if seconds >= 1 else f"<{1000 * seconds:g} ms"


def short(number: float) -> str:
    """A number in at most six characters: exact below 100,000, else its first three digits and a unit."""
    if number < 99_999.5:
        return f"{number:,.0f}"
    for unit in ("k", "M", "G", "T"):
        number /= 1000
        if number < 999.5 or unit == "T":
            break
    return f"{number:.3g}{unit}"


def _batch_lines(status: Mapping[str, Any]) -> Iterator[str]:
    batchers = [router["statistics"]["batcher"] for router in status["routers"]]
    totals = add_up(batchers)
    if not totals["batches"]:
        return
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in totals["closed"].items())
    size, busy = totals["tokens"] / totals["batches"], totals["utilisation"] / len(batchers)
    errors = [batcher["latency"]["error_ratio"] for batcher in batchers if batcher["latency"]["trusted"]]
    model = f"; latency model off by {sum(errors) / len(errors):.0%}" if errors else ""
    yield f"batches: {totals['batches']:,} of {size:,.0f} tokens, {totals['in_flight']} in flight, busy {busy:.0%}"
    yield f"  closed by {reasons}{model}"


def _generation_lines(status: Mapping[str, Any]) -> Iterator[str]:
    engines = [router["statistics"]["engine"] for router in status["routers"]]
    totals = add_up([engine for engine in engines if engine is not None])
    if totals.get("steps"):
        tokens = f"{totals['prefill_tokens']:,} prompt tokens, {totals['decode_tokens']:,} generated"
        yield f"generation: {totals['running']:,} sequences, KV cache {_size(totals['kv_bytes'])}; {tokens}"
        blocks = totals["kv_blocks"]
        held = f"{blocks['held']:,} held, {blocks['kept']:,} kept, {blocks['free']:,} free"
        known = blocks["prefix_hit_tokens"] / max(1, blocks["prefix_query_tokens"])
        yield f"  KV blocks: {held}; {known:.0%} of prompt tokens known; preempted {totals['preemptions']:,} times"


def _cache_lines(cache: Mapping[str, Any]) -> Iterator[str]:
    if not cache:
        return
    outcomes = ", ".join(f"{name} {count:,}" for name, count in cache["outcomes"].items() if count)
    size = f"{cache['entries']:,} entries, {_size(cache['bytes'])} of {_size(cache['max_bytes'])}"
    yield f"cache: {size}; requests: {outcomes or 'none yet'}"
    if second := cache.get("second"):
        misses, dropped = sum(second["misses"].values()), sum(second["dropped"].values())
        trouble = "; breaker open" if second["breaker_open"] else ""
        counts = f"hits {second['hits']:,}, misses {misses:,}, written {second['written']:,}, dropped {dropped:,}"
        yield f"  second level: {counts}{trouble}"


def _size(size_bytes: float) -> str:
    unit, size = next((u, size_bytes / n) for u, n in _UNITS if size_bytes >= n or n == 1024)
    return f"{size:,.1f} {unit}"


def _refused_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """Live settings that a replica did not take: Serve calls the deployment updated all the same."""
    groups = [replica for group in status["groups"] for replica in group["replicas"]]
    for replica in (*status["gateways"], *status["routers"], *groups):
        if replica.get("refused_settings"):
            yield f"{replica['id']} keeps its old settings: {replica['refused_settings']}"


def replica_table(status: Mapping[str, Any]) -> Table:
    """What runs where, and in what state; a deployment of which nothing runs is shown too."""
    name = status["model"]["name"] + ": " if status["model"] else ""
    table = Table(title=f"{name}what runs where", title_justify="left")
    for column in ("deployment", "replica", "process", "state", "holds", "weights"):
        right = column in ("process", "weights")
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for label, replicas, holds in (
        ("gateway", status["gateways"], "HTTP, result cache"),
        ("router", status["routers"], "trunk and gates"),
        *((group["name"], group["replicas"], _experts_text(group["experts"])) for group in status["groups"]),
    ):
        for replica in replicas:
            weights = _size(replica["weights_bytes"]) if "weights_bytes" in replica else ""
            state = Text(replica["state"], style="" if replica["state"] == "running" else "red")
            table.add_row(label, replica["id"], str(replica["pid"]), state, holds, weights)
        if not replicas:
            table.add_row(label, "", "", Text("none", style="red"), holds, "")
    return table


def _experts_text(experts: Sequence[int]) -> str:
    ordered = sorted(experts)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"experts {ordered[0]} to {ordered[-1]}"
    return "experts " + " ".join(map(str, ordered))


def rates_line(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> str:
    """What was done per second between two looks; empty when no time has passed. Counters begin at 0 with their
    replica, so what a replica that is new has done counts whole."""
    if seconds <= 0:
        return ""
    old, new = dict(_counters(before)), dict(_counters(now))
    done = dict.fromkeys(("requests", "tensor", "prompt", "generated"), 0.0)
    for key, count in new.items():
        # Another gateway may show what it last knew of a replica that hangs: less than was known already.
        done[key[1]] += max(0.0, count - old.get(key, 0.0))
    requests, *tokens = (f"{count / seconds:,.1f} {name}" for name, count in done.items())
    return f"per second: {requests}; tokens: {', '.join(tokens)}"


def _counters(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """What each replica has done since it began, by replica and name."""
    for gateway in status["gateways"]:
        counts = [count for route, _, count in gateway["requests"]["statuses"] if route not in _WATCHERS]
        yield (gateway["id"], "requests"), float(sum(counts))
    for router in status["routers"]:
        batcher, engine = router["statistics"]["batcher"], router["statistics"]["engine"]
        yield (router["id"], "tensor"), float(batcher["tokens"])
        if engine is not None:
            yield (router["id"], "prompt"), float(engine["prefill_tokens"])
            yield (router["id"], "generated"), float(engine["decode_tokens"])
