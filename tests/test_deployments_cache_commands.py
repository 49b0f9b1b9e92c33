"""`pimoe cache stats` and `pimoe cache flush`, against a gateway that computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cache_backend import Backend
from fake_gateway import FakeGateway, served
from fake_second_level import FakeSecondLevel
from pimoe.clients import Client, ModelNotFoundError
from pimoe.deployments.cache_commands import cache_cli
from pimoe.deployments.gateway import _plain
from pimoe.deployments.totals import add_up
from pimoe.runtime.caching import CachedBackend, CacheLimits, ResultCache
from typer.testing import CliRunner


def statistics(second: bool) -> dict[str, Any]:
    cache: Any = ResultCache(CacheLimits())
    return _plain(CachedBackend(Backend(), cache, FakeSecondLevel() if second else None).statistics())


class Gateway(FakeGateway):
    cache: dict[str, Any]

    async def status(self) -> dict[str, Any]:
        return {"gateways": [{}, {}], "cache": self.cache}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Gateway, str]]:
    gateway = Gateway()
    with served(gateway) as address:
        yield gateway, f"http://{address}"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cache_cli, list(arguments), env={"COLUMNS": "120"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_numbers_of_gateways_add_up() -> None:
    parts = [statistics(second=True) for _ in range(2)]
    parts[0]["outcomes"]["memory"] = 2
    parts[1]["outcomes"]["memory"] = 3
    parts[1]["second"]["misses"]["timeout"] = 4
    total = add_up(parts)
    assert total["outcomes"]["memory"] == 5
    assert total["second"]["misses"]["timeout"] == 4
    assert total["max_bytes"] == 2 * parts[0]["max_bytes"]
    assert "second" not in add_up([statistics(second=False)] * 2)


def test_stats_shows_what_happened(server: tuple[Gateway, str]) -> None:
    gateway, url = server
    gateway.cache = statistics(second=True)
    gateway.cache["outcomes"]["second"] = 12345
    gateway.cache["second"]["misses"]["corrupt"] = 7
    output = run("stats", "--url", url)
    for text in ("2 gateways", "12,345", "corrupt", "7", "256.0 MiB", "nothing yet"):
        assert text in output, output
    assert "undecryptable" not in output
    gateway.cache = add_up([statistics(second=False)])
    assert "second level" not in run("stats", "--url", url)


@pytest.mark.parametrize(
    ("options", "scope"),
    [
        ([], (None, None)),
        (["--model", "echo"], ("echo", None)),
        (["--tenant", "acme"], (None, "acme")),
        (["--tenant", "acme", "--model", "echo"], ("echo", "acme")),
    ],
)
def test_flush_says_what_it_reached(
    server: tuple[Gateway, str], options: list[str], scope: tuple[str | None, str | None]
) -> None:
    gateway, url = server
    output = run("flush", "--url", url, *options)
    assert output.strip() == "flushed 3 answers in 2 gateways, and deleted 5 in the second level"
    assert gateway.flushes[-1] == scope


def test_the_client_flushes(server: tuple[Gateway, str]) -> None:
    gateway, url = server
    with Client(url, retries=0) as client:
        assert client.flush_cache(tenant="")["flushed"] == 3
        assert gateway.flushes[-1] == (None, "")
        with pytest.raises(ModelNotFoundError):
            client.flush_cache(model="another")


def test_a_wrong_url_is_named() -> None:
    result = CliRunner().invoke(cache_cli, ["stats", "--url", "foo"])
    assert result.exit_code == 2
    assert "foo" in result.output
