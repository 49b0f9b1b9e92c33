"""Live settings as `serve deploy` brings them: a config whose `user_config` changes reaches running replicas; and
what the bounds of the queue do over HTTP."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from pimoe.clients import Client, PimoeClientError
from pimoe.deployments import gateway
from pimoe.deployments.app import build
from pimoe.deployments.cluster import LocalCluster
from pimoe.deployments.replica import LiveSettings
from pimoe.runtime.errors import ConfigurationError, UnavailableError
from ray import serve

NAME, PREFIX = "live", "/live"
HIDDEN = 128


class Reply(NamedTuple):
    status: int
    headers: Any
    body: dict[str, Any]


class Live:
    """An application of its own on the shared cluster, deployed from a config again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = Client(url, retries=0)
        self._numbers = count()

    def deploy(self, **user_configs: dict[str, Any]) -> None:
        """What `serve deploy` sends to the controller."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        share = {"num_cpus": 0.1}
        args = {"groups": 1, "group_defaults": share, "router": share, "gateway": share}
        application = {
            "name": NAME,
            "route_prefix": PREFIX,
            "import_path": "pimoe.deployments.app:build",
            "args": {**args, "links": {"transport": "unix"}, "health_check_period_s": 0.5},
            "deployments": [{"name": name, "user_config": config} for name, config in user_configs.items()],
            "logging_config": {"enable_access_log": False, "log_level": "ERROR"},
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def page(self) -> dict[str, Any]:
        """The status page. Serve does not route to a replica while it brings new settings to it: for an instant
        the only gateway is not reached, and of a router the page says what it knew before."""
        pages: list[dict[str, Any]] = []

        def answers() -> bool:
            with suppress(PimoeClientError):
                pages.append(self.client.status())
            return bool(pages and pages[-1]["routers"] and pages[-1]["gateways"])

        wait_until(answers)
        return pages[-1]

    def router(self) -> dict[str, Any]:
        (router,) = self.page()["routers"]
        return dict(router)

    def gateway(self) -> dict[str, Any]:
        (gateway,) = self.page()["gateways"]
        return dict(gateway)

    def pids(self) -> tuple[int, int]:
        return self.router()["pid"], self.gateway()["pid"]

    def batch_tokens(self) -> int:
        return int(self.router()["statistics"]["batcher"]["max_batch_tokens"])

    def refused(self, deployment: str) -> str:
        """What is wrong with a deployment's latest settings; empty: nothing."""
        status = self.page()
        parts = {
            "router": status["routers"],
            "gateway": status["gateways"],
            "group-0": status["groups"][0]["replicas"],
        }
        (replica,) = parts[deployment]
        return str(replica["refused_settings"] or "")

    def books(self, name: str) -> dict[str, Any]:
        """One class of the queue for tensors."""
        return dict(self.router()["statistics"]["batcher"]["queue"]["classes"][name])

    def waiting(self, name: str) -> int:
        return int(self.books(name)["items"])

    def infer(self, priority: str, tokens: int = 1) -> Reply:
        """One tensor, never the same twice, over plain HTTP."""
        rows = [[float(next(self._numbers))] * HIDDEN] * tokens
        tensor = {"name": "hidden_states", "shape": [tokens, HIDDEN], "datatype": "FP32", "data": rows}
        request = urllib.request.Request(
            f"{self.url}/v2/models/pimoe-embedded/infer", json.dumps({"inputs": [tensor]}).encode()
        )
        request.add_header("x-pimoe-priority", priority)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Reply(response.status, response.headers, json.loads(response.read()))
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, json.loads(error.read()))


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "what the test waits for did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def deployed(application: LocalCluster) -> Iterator[Live]:
    live = Live(f"{application.url}{PREFIX}")
    live.deploy()
    wait_until(lambda: _is_ready(live))
    yield live
    live.client.close()
    serve.delete(NAME)


def _is_ready(live: Live) -> bool:
    try:
        return live.client.health().ready
    except PimoeClientError:  # not routed yet
        return False


@pytest.fixture
def live(deployed: Live) -> Iterator[Live]:
    """The application; afterwards it is as `build` made it, and what waited is answered."""
    pids = deployed.pids()
    yield deployed
    deployed.deploy()
    wait_until(lambda: deployed.batch_tokens() == 4096)
    wait_until(lambda: deployed.gateway()["cache"]["max_bytes"] == 256 * 2**20)
    assert deployed.pids() == pids  # whatever a test did, nothing was restarted


# No batch closes: whatever comes waits for company, so that tests know what is in the queue.
HELD = {"min_batch_tokens": 1000, "max_wait_s": 600.0, "max_batch_tokens": 4000}


def test_batching_changes_while_serving(live: Live) -> None:
    live.deploy(router={"batching": {"max_batch_tokens": 77}})
    wait_until(lambda: live.batch_tokens() == 77)
    before = live.router()["statistics"]["batcher"]["batches"]
    assert live.infer("default", tokens=154).status == 200
    # In two batches: one would be larger than allowed.
    wait_until(lambda: live.router()["statistics"]["batcher"]["batches"] == before + 2)


def test_the_queue_changes_while_serving_and_a_full_one_is_429(live: Live) -> None:
    queue = {"max_items": 4, "class_shares": {"batch": 0.5}}
    before = live.books("batch")
    live.deploy(router={"batching": HELD, "queue": queue})
    wait_until(lambda: live.batch_tokens() == 4000)
    with ThreadPoolExecutor(32) as pool:
        flood = [pool.submit(live.infer, "batch") for _ in range(12)]
        # Two of the class fit; the others are told at once.
        wait_until(lambda: sum(one.done() for one in flood) >= 10)
        refused = [one.result() for one in flood if one.done()]
        assert [reply.status for reply in refused] == [429] * 10
        wait_until(lambda: live.waiting("batch") == 2)
        for reply in refused:
            assert reply.status == 429
            assert reply.body["code"] == "overloaded"
            assert "requests of this priority" in reply.body["detail"]
            milliseconds = int(reply.headers["retry-after-ms"])
            assert milliseconds >= 1
            assert int(reply.headers["retry-after"]) == max(1, math.ceil(milliseconds / 1000))

        # The flood keeps nobody else out ...
        urgent = [pool.submit(live.infer, "interactive") for _ in range(2)]
        wait_until(lambda: live.waiting("interactive") == 2)
        assert live.waiting("batch") == 2
        # ... and gives way where the queue is full: the newest of the lowest class.
        urgent.append(pool.submit(live.infer, "interactive"))
        wait_until(lambda: live.waiting("interactive") == 3)
        wait_until(lambda: sum(one.done() for one in flood) == 11)
        (shed,) = [one.result() for one in flood if one.done() and one.result() not in refused]
        assert shed.status == 429
        assert "shed" in shed.body["detail"]

        live.deploy(router={"batching": {}})
        assert [one.result(timeout=60).status for one in urgent] == [200] * 3
        assert sorted(one.result(timeout=60).status for one in flood) == [200, *[429] * 11]
    wait_until(lambda: live.waiting("batch") == 0)
    books = live.books("batch")
    assert [books[name] - before[name] for name in ("refused", "shed")] == [10, 1]


def test_tokens_bound_a_class_too(live: Live) -> None:
    live.deploy(router={"batching": HELD, "queue": {"max_tokens": 100, "class_shares": {"batch": 0.5}}})
    wait_until(lambda: live.batch_tokens() == 4000)
    with ThreadPoolExecutor(32) as pool:
        waiting: list[Future[Reply]] = [pool.submit(live.infer, "batch", 40)]
        wait_until(lambda: live.waiting("batch") == 1)
        assert live.infer("batch", 11).status == 429
        waiting.append(pool.submit(live.infer, "batch", 10))
        wait_until(lambda: live.waiting("batch") == 2)
        waiting.append(pool.submit(live.infer, "interactive", 50))
        wait_until(lambda: live.waiting("interactive") == 1)
        live.deploy(router={"batching": {}})
        assert [one.result(timeout=60).status for one in waiting] == [200] * 3


def test_the_cache_changes_while_serving(live: Live) -> None:
    def ask() -> str:
        outcomes: list[str] = []

        def answered() -> bool:
            with suppress(urllib.error.HTTPError):  # as in `Live.page`
                outcomes.append(ask_once())
            return bool(outcomes)

        wait_until(answered)
        return outcomes[0]

    def ask_once() -> str:
        request = urllib.request.Request(
            f"{live.url}/v1/completions",
            json.dumps({"model": "pimoe-embedded", "prompt": "reverse: planet\n", "temperature": 0}).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.headers["x-pimoe-cache"])

    ask()
    assert ask() == "hit"
    live.deploy(gateway={"cache": {"max_bytes": 0}})
    wait_until(lambda: live.gateway()["cache"]["max_bytes"] == 0)
    assert [ask(), ask()] == ["bypass", "bypass"]
    live.deploy(gateway={"cache": {"max_bytes": 1_000_000, "policy": "sieve", "prefetch": {"enabled": True}}})
    wait_until(lambda: live.gateway()["cache"]["max_bytes"] == 1_000_000)
    assert [ask(), ask()] == ["miss", "hit"]


@pytest.mark.parametrize(
    ("deployment", "wrong", "words"),
    [
        ("router", {"batching": {"max_batch_tokens": 0}}, "max_batch_tokens is 0"),
        ("router", {"batching": {"max_batch_token": 5}}, "max_batch_token"),
        ("router", {"batching": {"max_batch_tokens": 9}, "queue": {"max_items": 0}}, "max_items is 0"),
        ("router", {"batching": {"max_batch_tokens": 9}, "queue": {"class_shares": {"vip": 1}}}, "class_shares"),
        ("router", {"batching": {"max_batch_tokens": 9}, "queues": {}}, "'queues' is none of batching, queue"),
        ("router", {"batching": 5}, "must be a map"),
        ("gateway", {"cache": {"max_bytes": -1}}, "max_bytes"),
        ("gateway", {"cache": {"max_bytes": 9, "prefetch": {"speed": 1}}}, "speed"),
        ("group-0", {"threads": "many"}, "many"),
    ],
)
def test_wrong_settings_are_refused_whole_and_the_old_ones_stay(
    live: Live, deployment: str, wrong: dict[str, Any], words: str
) -> None:
    """Serve would end a replica whose `reconfigure` raises, and start others that cannot start either."""
    live.deploy(router={"batching": {"max_batch_tokens": 77}})
    wait_until(lambda: live.batch_tokens() == 77)
    live.deploy(**{"router": {"batching": {"max_batch_tokens": 77}}, deployment: wrong})
    wait_until(lambda: live.refused(deployment))
    assert words in live.refused(deployment)
    assert live.batch_tokens() == 77
    assert live.gateway()["cache"]["max_bytes"] == 256 * 2**20
    assert live.infer("default").status == 200
    live.deploy(router={"batching": {"max_batch_tokens": 78}})
    wait_until(lambda: live.batch_tokens() == 78 and not live.refused(deployment))


# Without Ray -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        {"router": {"batching": {"max_batch_tokens": 0}}},
        {"router": {"queue": {"max_items": 0}}},
        {"router": {"queue": {"class_shares": {"vip": 1.0}}}},
        {"router": {"queue": {"class_shares": {"batch": 0.0}}}},
        {"gateway": {"cache": {"max_bytes": -1}}},
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(section: dict[str, Any]) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        build(section)


def _read(user_config: Mapping[str, Any], into: list[int]) -> None:
    into.append(int(user_config["a"]))


def test_a_replica_that_only_starts_must_have_right_settings() -> None:
    settings, read = LiveSettings({"a": 0}), list[int]()
    for wrong, kind in (({"a": "?"}, ValueError), ({}, KeyError), ({"a": 1, "b": 1}, ConfigurationError)):
        with pytest.raises(kind):
            settings.take(wrong, partial(_read, into=read))
    assert (settings.refused, read) == (None, [])


def test_a_replica_that_runs_refuses_and_recovers() -> None:
    settings, read = LiveSettings({"a": 0}), list[int]()
    settings.take({"a": 1}, partial(_read, into=read))
    settings.take({"a": "?"}, partial(_read, into=read))
    assert "invalid literal" in str(settings.refused)
    settings.take({"a": 2, "b": 3}, partial(_read, into=read))
    assert settings.refused == "'b' is none of a"
    settings.take({"a": 4}, partial(_read, into=read))
    assert settings.refused is None
    assert read == [1, 4]


def test_what_a_section_leaves_out_is_as_the_application_has_it() -> None:
    settings, read = LiveSettings({"a": {"x": 1, "y": 2}}), list[Mapping[str, Any]]()
    settings.take({"a": {"y": 3}}, lambda given: read.append(given["a"]))
    assert read == [{"x": 1, "y": 3}]
    settings.take({"a": {"z": 3}}, lambda given: read.append(given["a"]))
    assert settings.refused == "a.z cannot change while serving"
    settings.take({"a": 3}, lambda given: read.append(given["a"]))
    assert settings.refused == "a is 3; it must be a map"
    assert len(read) == 1


@pytest.mark.parametrize("linked", [True, False])
async def test_a_gateway_that_joins_waits_for_a_router_once(linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve sends it requests when its first settings are in force."""
    told = []

    class Pool:
        async def start(self) -> None:
            told.append("start")

        async def wait_ready(self, timeout_s: float) -> None:
            told.append("wait")
            if not linked:
                raise UnavailableError("router: no live replica")

    monkeypatch.setattr(gateway.garbage, "settle", lambda: None)
    replica: Any = SimpleNamespace(
        _live=LiveSettings({}),
        _change=lambda _: None,
        _pool=Pool(),
        _joined=False,
        _prefetcher=SimpleNamespace(start=lambda: told.append("serve")),
    )
    for _ in range(2):
        await gateway.GatewayReplica.reconfigure(replica, {})
    assert told == ["start", "wait", "serve", "start", "serve"]
