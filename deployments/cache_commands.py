"""`pimoe cache stats` and `pimoe cache flush`: the result cache of a running application."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..clients import Client

cache_cli = typer.Typer(help="The result cache of a running application.", no_args_is_help=True)

UrlOption = Annotated[str, typer.Option(help="Where the application answers.")]

_URL = "http://127.0.0.1:8000"


@cache_cli.command()
def stats(url: UrlOption = _URL) -> None:
    """Show what the cache holds and how often it answered, all gateways together."""
    with _client(url) as client:
        status = client.status()
    Console().print(stats_table(status["cache"], len(status["gateways"])))


@cache_cli.command()
def flush(
    url: UrlOption = _URL,
    model: Annotated[str | None, typer.Option(help="Only answers of this model.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only answers of this tenant.")] = None,
) -> None:
    """Forget stored answers, in every gateway and in the second level."""
    with _client(url) as client:
        done = client.flush_cache(model=model, tenant=tenant)
    second = done["second_level"]
    also = "" if second is None else f", and deleted {second['deleted']} in the second level"
    many = f"{done['gateways']} gateway{'s' * (done['gateways'] != 1)}"
    Console().print(f"flushed {done['flushed']} answers in {many}{also}", highlight=False)


def stats_table(cache: Mapping[str, Any], gateways: int) -> Table:
    """The cache's part of `/admin/status`, level by level; what never happened is left out."""
    table = Table(title=f"result cache of {gateways} gateway{'s' * (gateways != 1)}", title_justify="left")
    for column in ("", "what", "count"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for name, values in _sections(cache):
        rows = [(what, count) for what, count in values if count]
        for index, (what, count) in enumerate(rows or [("nothing yet", "")]):
            table.add_row(
                name if index == 0 else "", what, _shown(what, count), end_section=index == len(rows) - 1
            )
    return table


def _sections(cache: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    yield "answered by", list(cache["outcomes"].items())
    yield "bypassed", list(cache["bypass_reasons"].items())
    yield "memory", [(name, value) for name, value in cache.items() if isinstance(value, int | float)]
    if any((prefetch := cache.get("prefetch") or {}).get(name) for name in ("recorded", "warmed")):
        yield "prefetch", list(prefetch.items())
    if cache.get("second") is None:
        return
    second = cache["second"]
    yield "second level", [(name, value) for name, value in second.items() if isinstance(value, int | float)]
    yield "  misses", list(second["misses"].items())
    yield "  not stored", list(second["dropped"].items())


def _shown(what: str, count: Any) -> str:
    return f"{count / 2**20:.1f} MiB" if what.endswith("bytes") and count else f"{count:,}" if count else ""


def _client(url: str) -> Client:
    try:
        return Client(url)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
