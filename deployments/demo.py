"""`pimoe demo`: the whole application once, for a newcomer to look at."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..clients import Client
from ..runtime.embedded import SKILLS, held_out, is_exact
from .cluster import LocalCluster
from .settings import AppSettings


def run_demo(cluster: LocalCluster, settings: AppSettings, console: Console) -> None:
    """Start, show, ask, and leave stopping to the caller.

    Raises:
        PimoeError, PimoeClientError: something did not come up, or did not answer.
    """
    started = time.monotonic()
    cluster.start(settings, lambda step: console.print(f"[dim]{time.monotonic() - started:5.1f} s[/]  {step} ..."))
    console.print(f"[dim]{time.monotonic() - started:5.1f} s[/]  ready at {cluster.url}\n")
    with Client(cluster.url) as client:
        console.print(placement_table(client.status()))
        _ask_every_skill(client, console)
        _send_tensor(client, console)
        _ask_again(client, console)
    console.print(f"\nThe same application, to keep: [bold]pimoe serve --port {cluster.port}[/]")


def placement_table(status: dict[str, Any]) -> Table:
    """What runs where: deployment, replica, process, what it holds, bytes of weights; fits 80 columns."""
    table = Table(title=f"{status['model']['name']}: what runs where", title_justify="left")
    for column in ("deployment", "replica", "process", "holds", "weights"):
        table.add_column(column, justify="right" if column in ("process", "weights") else "left")
    for gateway in status["gateways"]:
        table.add_row("gateway", gateway["id"], str(gateway["pid"]), "HTTP, result cache", "")
    for router in status["routers"]:
        table.add_row(*_row("router", router, "trunk and gates"))
    for group in status["groups"]:
        for replica in group["replicas"]:
            table.add_row(*_row(group["name"], replica, "experts " + " ".join(map(str, group["experts"]))))
    return table


def _row(deployment: str, replica: dict[str, Any], holds: str) -> tuple[str, ...]:
    weights = f"{replica['weights_bytes']:,} B"
    return deployment, replica["id"], str(replica["pid"]), holds, weights


def _ask_every_skill(client: Client, console: Console) -> None:
    console.print("\nA prompt of every skill, streamed:")
    for skill in SKILLS:
        (example,) = held_out(skill, 1, seed=7)
        console.print(f"  {example.prompt.strip():<22}", end=" ", highlight=False)
        started, first_s, text = time.monotonic(), 0.0, ""
        for chunk in client.stream(example.prompt, max_tokens=64, temperature=0):
            first_s = first_s or time.monotonic() - started
            text += chunk.text
            console.print(chunk.text, end="", style="bold", markup=False, highlight=False)
        total_s = time.monotonic() - started
        mark = "[green]right[/]" if is_exact(example, text) else f"[red]wrong, {example.answer!r}[/]"
        console.print(
            f"  {mark} [dim]first token {1e3 * first_s:.0f} ms, all {1e3 * total_s:.0f} ms[/]", highlight=False
        )


def _send_tensor(client: Client, console: Console) -> None:
    hidden_size = client.status()["model"]["hidden_size"]
    hidden = np.random.default_rng(0).standard_normal((16, hidden_size), dtype=np.float32)
    started = time.monotonic()
    output = client.infer(hidden, layer=0)
    console.print(
        f"\nA tensor through the experts of layer 0: {list(hidden.shape)} -> {list(output.shape)} "
        f"[dim]{1e3 * (time.monotonic() - started):.1f} ms[/]",
        highlight=False,
    )


def _ask_again(client: Client, console: Console) -> None:
    (example,) = held_out(SKILLS[0], 1, seed=7)
    started = time.monotonic()
    again = client.generate(example.prompt, max_tokens=64, temperature=0)
    console.print(
        f"\nThe first prompt again: [bold]{again.text}[/] [dim]{1e3 * (time.monotonic() - started):.1f} ms[/], "
        f"from the cache: [bold]{again.cache}[/]",
        highlight=False,
    )
