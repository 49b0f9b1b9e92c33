"""Two gateways with a second level between them, as Ray Serve runs them: what one computes the other finds, a
flush reaches all three, and live settings arrive."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pimoe.clients import Client, UnavailableError
from pimoe.deployments.app import build
from pimoe.deployments.cluster import LocalCluster
from ray import serve
from redis_server import BINARY, RedisServer

KEY = "0f" * 32
NAME, PREFIX = "cached", "/cached"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip("neither redis-server nor valkey-server is in PATH")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def url(application: LocalCluster, server: RedisServer) -> Iterator[str]:
    share = {"num_cpus": 0.1}
    second = {"url": server.url, "encryption_key": KEY, "lookup_timeout_s": 5.0}
    gateway = {**share, "num_replicas": 2, "cache": {"second_level": second, "prefetch": {"enabled": True}}}
    settings = {"group_defaults": share, "router": share, "gateway": gateway, "links": {"transport": "unix"}}
    serve.run(build({**settings, "groups": 1}), name=NAME, route_prefix=PREFIX)
    with Client(f"{application.url}{PREFIX}") as client:
        wait_until(lambda: all(client.health().ready for _ in range(4)))  # gateways take turns
    yield f"{application.url}{PREFIX}"
    serve.delete(NAME)


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "what the test waits for did not happen"
        time.sleep(0.05)


def ask(url: str, prompt: str, tenant: str = "") -> tuple[str, str]:
    """What the cache did, and the answer's bytes; on a connection of its own."""
    body = {"model": "pimoe-embedded", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("x-pimoe-tenant", tenant)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.headers["x-pimoe-cache"], response.read().decode()


def cache(url: str) -> dict[str, Any]:
    with Client(url) as client:
        page = client.status()
    assert len(page["gateways"]) == 2
    return dict(page["cache"])


def ask_both(url: str, prompt: str, tenant: str = "") -> str:
    """Ask until both gateways have answered from memory; the one answer of all."""
    seen = set()

    def enough() -> bool:
        # Gateways take turns: with one question for each look at the status, one of them would get all questions.
        seen.update(ask(url, prompt, tenant)[1] for _ in range(2))
        return all(gateway["cache"]["outcomes"]["memory"] > before[gateway["id"]] for gateway in gateways())

    def gateways() -> list[dict[str, Any]]:
        with Client(url) as client:
            return list(client.status()["gateways"])

    before = {gateway["id"]: gateway["cache"]["outcomes"]["memory"] for gateway in gateways()}
    wait_until(enough)
    (answer,) = seen
    return answer


def test_what_one_gateway_computes_the_other_finds(url: str) -> None:
    first = ask(url, "reverse: planet\n")
    assert first[0] == "miss"
    wait_until(lambda: cache(url)["second"]["written"] == 1)
    assert ask_both(url, "reverse: planet\n") == first[1]
    assert cache(url)["outcomes"]["second"] == 1
    assert cache(url)["outcomes"]["miss"] == 1


def test_tenants_are_apart(url: str) -> None:
    answers = [ask(url, "reverse: market\n", tenant) for tenant in ("a", "b", "a")]
    assert [outcome for outcome, _ in answers][:2] == ["miss", "miss"]
    texts = [json.loads(answer)["choices"][0]["text"] for _, answer in answers]
    assert texts == ["tekram"] * 3


def test_a_flush_reaches_every_gateway_and_the_second_level(url: str, server: RedisServer) -> None:
    prompts = ["reverse: window\n", "reverse: garden\n"]
    for prompt, tenant in zip(prompts, "xy", strict=True):
        written = cache(url)["second"]["written"]
        ask(url, prompt, tenant)
        wait_until(lambda written=written: cache(url)["second"]["written"] > written)
        ask_both(url, prompt, tenant)
    with Client(url) as client:
        done = client.flush_cache(tenant="x")
        assert done == {"flushed": 2, "gateways": 2, "second_level": {"deleted": 1}}
        assert [ask(url, prompt, tenant)[0] for prompt, tenant in zip(prompts, "xy", strict=True)] == [
            "miss",
            "hit",
        ]
        done = client.flush_cache()
    assert done["gateways"] == 2
    assert done["flushed"] >= 3
    assert server.entries() == []
    assert cache(url)["entries"] == 0
    assert ask(url, prompts[1], "y")[0] == "miss"


def test_live_settings_arrive_and_secrets_show_nowhere(url: str, server: RedisServer) -> None:
    handle = serve.get_deployment_handle("gateway", NAME)
    live = {"max_bytes": 1_000_000, "ttl_s": 60.0, "policy": "sieve", "prefetch": {"enabled": False}}
    handle.broadcast("reconfigure", {"cache": live}).results(timeout_s=10)
    assert cache(url)["max_bytes"] == 2_000_000
    with Client(url) as client:
        page = json.dumps(client.status())
    assert KEY not in page
    assert KEY not in str(serve.status())
    assert not any(KEY.encode() in part for part in server.everything().values())


def test_without_the_second_level_answers_come_and_flushes_fail_loudly(url: str, server: RedisServer) -> None:
    server.kill()
    assert ask(url, "reverse: silver\n")[0] == "miss"
    wait_until(lambda: ask(url, "reverse: silver\n")[0] == "hit")
    assert cache(url)["second"]["misses"]["unavailable"] > 0
    with Client(url, retries=0) as client, pytest.raises(UnavailableError, match="second level"):
        client.flush_cache()
    assert ask(url, "reverse: silver\n")[0] == "miss"  # the gateways are flushed all the same
    server.start()
    with Client(url) as client:
        assert client.flush_cache()["second_level"] == {"deleted": 0}


def test_the_folder_of_the_tokenizer_decides(tmp_path: Path) -> None:
    from pimoe.deployments.gateway import _tokenizer_digest

    seen = {_tokenizer_digest(tmp_path)}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        for content in (b"", b"x"):
            (tmp_path / name).write_bytes(content)
            seen.add(_tokenizer_digest(tmp_path))
    assert len(seen) == 7
