"""The pool: choice of replica, credits, failover, and discovery that may fail."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from link_peers import SECRET, scripted_server, tensor
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidTensorError,
    LinkProtocolError,
    OverloadedError,
    PayloadTooLargeError,
    PimoeError,
    RequestCancelledError,
    UnavailableError,
)
from pimoe.runtime.links import Call, Endpoint, LinkLimits, LinkPool, LinkServer, Reply
from pimoe.runtime.links.addresses import new_unix_address
from pimoe.runtime.links.frames import Kind
from pimoe.runtime.links.pool import MAX_LOST_REPLICAS
from pimoe.runtime.requests import TensorData
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TIMEOUT_S = 20.0
TINY_S = 0.02
NEVER_S = 1000.0  # between two rounds of discovery: only a wake-up brings the next


def soon() -> float:
    """A deadline that only a failing test reaches."""
    return asyncio.get_running_loop().time() + TIMEOUT_S


def at_once() -> float:
    """A deadline that is meant to be reached."""
    return asyncio.get_running_loop().time() + TINY_S


class Replica:
    """A server whose handler holds every call until `gate` is set, and answers with the replica's name."""

    def __init__(self, name: str, credits: int | None = None) -> None:
        self.name = name
        self.gate = asyncio.Event()
        self.held = self.most_held = 0
        self.outcome: Exception | None = None
        self.server = LinkServer(self.handle, SECRET, credits=credits)
        self.endpoint = Endpoint(name, "node", ())

    async def handle(self, call: Call) -> Reply:
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        try:
            await self.gate.wait()
            if self.outcome is not None:
                raise self.outcome
            return Reply({"by": self.name}, call.tensors)
        finally:
            self.held -= 1


class Cluster:
    """Replicas that come and go, and the discovery that names them."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.extra: list[Endpoint] = []
        self.rounds = 0
        self.failures: list[Exception] = []

    async def add(self, name: str, credits: int | None = None, open_gate: bool = True) -> Replica:
        replica = self.replicas[name] = Replica(name, credits)
        address = await replica.server.listen_unix(new_unix_address((name,)))
        replica.endpoint = Endpoint(name, "node", (address,))
        if open_gate:
            replica.gate.set()
        return replica

    async def kill(self, name: str) -> None:
        await self.replicas.pop(name).server.close()

    async def discover(self) -> Sequence[Endpoint]:
        self.rounds += 1
        if self.failures:
            raise self.failures.pop(0)
        return [*self.extra, *(replica.endpoint for replica in self.replicas.values())]


@pytest.fixture
async def cluster(nothing_left_behind: None) -> AsyncIterator[Cluster]:
    running = Cluster()
    yield running
    for name in list(running.replicas):
        await running.kill(name)


@contextlib.asynccontextmanager
async def pooled(cluster: Cluster, refresh_s: float = 0.01, **options: Any) -> AsyncIterator[LinkPool]:
    pool = LinkPool("group-0", cluster.discover, SECRET, "node", refresh_s=refresh_s, **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def ask(pool: LinkPool, deadline: float | None = None) -> str:
    reply = await pool.call("m", {}, [], soon() if deadline is None else deadline)
    return str(reply.meta["by"])


# Choice and credits


async def test_starting_links_every_replica_once(cluster: Cluster) -> None:
    for name in "abc":
        await cluster.add(name)
    async with pooled(cluster, NEVER_S) as pool:
        await asyncio.gather(pool.start(), pool.start())
        assert set(pool.links) == set(pool.endpoints) == set("abc")
        assert [len(replica.server._peers) for replica in cluster.replicas.values()] == [1, 1, 1]
        assert cluster.rounds == 1
        assert pool.statistics() == (3, 0, 0)


async def test_a_slow_first_round_does_not_link_twice(cluster: Cluster) -> None:
    await cluster.add("a")
    answer = asyncio.Event()

    async def discover() -> Sequence[Endpoint]:
        await answer.wait()
        return await cluster.discover()

    pool = LinkPool("group-0", discover, SECRET, "node", refresh_s=0.001)
    starting = [asyncio.create_task(pool.start()) for _ in range(2)]
    await eventually(lambda: pool._task is not None)
    pool._wake.set()
    answer.set()
    await asyncio.gather(*starting)
    await eventually(lambda: cluster.rounds > 3)
    assert len(cluster.replicas["a"].server._peers) == 1
    await pool.close()


async def test_calls_go_to_the_least_busy(cluster: Cluster) -> None:
    replicas = [await cluster.add(name, open_gate=False) for name in "abc"]
    async with pooled(cluster) as pool:
        calls = [asyncio.create_task(ask(pool)) for _ in range(9)]
        await eventually(lambda: sum(replica.held for replica in replicas) == 9)
        assert [replica.held for replica in replicas] == [3, 3, 3]
        assert pool.statistics().in_flight == 9
        for replica in replicas:
            replica.gate.set()
        assert sorted(await asyncio.gather(*calls)) == sorted("abc" * 3)
        assert pool.statistics().in_flight == 0


async def test_credits_are_respected(cluster: Cluster) -> None:
    replicas = [await cluster.add(name, credits=2, open_gate=False) for name in "ab"]
    async with pooled(cluster, NEVER_S) as pool:
        calls = [asyncio.create_task(ask(pool)) for _ in range(20)]
        await eventually(lambda: [replica.held for replica in replicas] == [2, 2])
        for replica in replicas:
            replica.gate.set()
        await asyncio.gather(*calls)
        assert [replica.most_held for replica in replicas] == [2, 2]


async def test_without_a_credit_in_time_the_deadline_is_exceeded(cluster: Cluster) -> None:
    replica = await cluster.add("a", credits=1, open_gate=False)
    async with pooled(cluster) as pool:
        first = asyncio.create_task(ask(pool))
        await eventually(lambda: replica.held == 1)
        with pytest.raises(DeadlineExceededError, match="no replica was free in time"):
            await ask(pool, at_once())
        replica.gate.set()
        await first


async def test_new_credits_wake_who_waits(cluster: Cluster) -> None:
    replica = await cluster.add("a", credits=1, open_gate=False)
    async with pooled(cluster, NEVER_S) as pool:
        calls = [asyncio.create_task(ask(pool)) for _ in range(3)]
        await eventually(lambda: replica.held == 1)
        (peer,) = replica.server._peers
        peer.send(Kind.CREDIT, 0, {"credits": 3})
        await eventually(lambda: replica.held == 3)
        replica.gate.set()
        await asyncio.gather(*calls)


async def test_a_credit_comes_back_however_its_holder_ends(cluster: Cluster) -> None:
    replica = await cluster.add("a", credits=1, open_gate=False)
    async with pooled(cluster) as pool:
        waiting = asyncio.create_task(ask(pool))
        await eventually(lambda: replica.held == 1)
        queued = asyncio.create_task(ask(pool))
        for task in (queued, waiting):
            task.cancel()
        await asyncio.gather(queued, waiting, return_exceptions=True)
        with pytest.raises(ZeroDivisionError):
            async with pool.acquire(soon()):
                raise ZeroDivisionError
        assert pool.statistics().in_flight == 0
        replica.gate.set()
        assert await ask(pool) == "a"


# Replicas that die, drain or fall silent


async def test_work_of_a_dead_replica_is_done_by_its_sibling(cluster: Cluster) -> None:
    doomed = await cluster.add("a", open_gate=False)
    sibling = await cluster.add("b")
    async with pooled(cluster, NEVER_S) as pool:
        sibling.server.drain()  # at first all goes to the one that will die
        await eventually(lambda: pool.links["b"].client.draining)
        pool.links["b"].client.draining = False
        pool.links["b"].in_flight += 100
        calls = [asyncio.create_task(ask(pool)) for _ in range(16)]
        await eventually(lambda: doomed.held == 16)
        pool.links["b"].in_flight -= 100
        await cluster.kill("a")
        assert await asyncio.gather(*calls) == ["b"] * 16
        assert pool.statistics() == (1, 0, 16)


async def test_a_call_that_kills_replicas_is_given_up(cluster: Cluster) -> None:
    doomed = [await cluster.add(str(number), open_gate=False) for number in range(MAX_LOST_REPLICAS + 1)]
    async with pooled(cluster, NEVER_S) as pool:
        call = asyncio.create_task(ask(pool))
        for _ in range(MAX_LOST_REPLICAS):
            await eventually(lambda: any(replica.held for replica in doomed))
            (victim,) = [replica for replica in doomed if replica.held]
            doomed.remove(victim)
            await cluster.kill(victim.name)
        with pytest.raises(UnavailableError, match="were lost with this call"):
            await call
        assert [replica.held for replica in doomed] == [0]


async def test_death_wakes_discovery_and_calls_wait_for_the_successor(cluster: Cluster) -> None:
    doomed = await cluster.add("a", open_gate=False)
    async with pooled(cluster, NEVER_S) as pool:
        call = asyncio.create_task(ask(pool))
        await eventually(lambda: doomed.held == 1)
        assert cluster.rounds == 1
        await cluster.add("a2")
        await cluster.kill("a")
        assert await call == "a2"
        assert set(pool.links) == {"a2"}


async def test_calls_wait_for_a_replica_that_appears_later_and_discovery_hurries(cluster: Cluster) -> None:
    async with pooled(cluster, NEVER_S) as pool:
        call = asyncio.create_task(ask(pool))
        ready = asyncio.create_task(pool.wait_ready(TIMEOUT_S))
        await eventually(lambda: cluster.rounds > 2)
        assert not call.done()
        await cluster.add("a")
        await ready
        assert await call == "a"


async def test_without_a_replica_it_is_unavailable_at_the_deadline(cluster: Cluster) -> None:
    async with pooled(cluster) as pool:
        with pytest.raises(UnavailableError, match="group-0: no live replica") as raised:
            await ask(pool, at_once())
        assert raised.value.retry_after_s == 0.02
        with pytest.raises(UnavailableError):
            await pool.wait_ready(TINY_S)


async def test_a_round_that_finds_nobody_at_the_deadline_changes_nothing(cluster: Cluster) -> None:
    async with pooled(cluster, NEVER_S) as pool:
        ready = asyncio.create_task(pool.wait_ready(TINY_S))
        await asyncio.sleep(0)
        time.sleep(2 * TINY_S)  # noqa: ASYNC251 - a loop that is busy until after the deadline
        pool._notify()
        with pytest.raises(UnavailableError, match="no live replica"):
            await ready


async def test_a_call_whose_time_is_up_is_not_sent(cluster: Cluster) -> None:
    replica = await cluster.add("a")
    async with pooled(cluster) as pool:
        with pytest.raises(DeadlineExceededError):
            await ask(pool, asyncio.get_running_loop().time() - 1.0)
        assert replica.server.calls == 0


async def test_a_silent_replica_loses_its_calls_to_a_sibling(cluster: Cluster) -> None:
    silent = await cluster.add("a", open_gate=False)
    await cluster.add("b")
    async with pooled(cluster, NEVER_S, attempt_timeout_s=TINY_S) as pool:
        pool.links["b"].in_flight += 100  # so that the silent one is preferred
        call = asyncio.create_task(ask(pool))
        await eventually(lambda: silent.held == 1)
        pool.links["b"].in_flight -= 100
        assert await call == "b"
        assert pool.statistics() == (2, 0, 1)


async def test_who_left_a_call_unanswered_comes_last_until_it_is_heard_of(cluster: Cluster) -> None:
    async with scripted_server() as (address, peers):
        cluster.extra.append(Endpoint("mute", "node", (address,)))
        await cluster.add("b")
        async with pooled(cluster, NEVER_S, attempt_timeout_s=TINY_S) as pool:
            assert list(pool.links) == ["mute", "b"]
            for _ in range(10):
                assert await ask(pool) == "b"
            assert pool.statistics().resent == 1  # once was enough
            peers[0].send(Kind.PONG, 0)
            await eventually(lambda: not pool.links["mute"].silent)
            assert await ask(pool) == "b"
            assert pool.statistics().resent == 2


async def test_a_replica_that_alone_is_silent_is_asked_until_the_deadline(cluster: Cluster) -> None:
    silent = await cluster.add("a", open_gate=False)
    async with pooled(cluster, NEVER_S, attempt_timeout_s=TINY_S / 4) as pool:
        with pytest.raises(DeadlineExceededError):
            await ask(pool, asyncio.get_running_loop().time() + 4 * TINY_S)
        assert silent.server.calls > 1
        call = asyncio.create_task(ask(pool))
        silent.gate.set()
        assert await call == "a"


async def test_draining_replicas_get_no_new_calls(cluster: Cluster) -> None:
    draining = await cluster.add("a", open_gate=False)
    async with pooled(cluster, NEVER_S) as pool:
        old = asyncio.create_task(ask(pool))
        await eventually(lambda: draining.held == 1)
        draining.server.drain()
        await eventually(lambda: pool.links["a"].client.draining)
        with pytest.raises(UnavailableError, match="no live replica"):
            await ask(pool, at_once())
        await cluster.add("b")
        pool._wake.set()
        assert [await ask(pool) for _ in range(4)] == ["b"] * 4
        draining.gate.set()
        assert await old == "a"


@pytest.mark.parametrize("error", [RequestCancelledError("shutting down"), UnavailableError("draining")])
async def test_what_a_draining_replica_gives_up_is_done_by_another(cluster: Cluster, error: PimoeError) -> None:
    draining = await cluster.add("a", open_gate=False)
    draining.outcome = error
    async with pooled(cluster) as pool:
        call = asyncio.create_task(ask(pool))
        await eventually(lambda: draining.held == 1)
        draining.server.drain()
        await eventually(lambda: pool.links["a"].client.draining)
        draining.gate.set()
        await cluster.add("b")
        assert await call == "b"


async def test_a_replica_that_discovery_leaves_out_finishes_and_is_left(cluster: Cluster) -> None:
    leaving = await cluster.add("a", open_gate=False)
    async with pooled(cluster) as pool:
        old = asyncio.create_task(ask(pool))
        await eventually(lambda: leaving.held == 1)
        del cluster.replicas["a"]
        await cluster.add("b")
        await eventually(lambda: "b" in pool.links)
        pool.links["b"].in_flight += 100  # the busier one
        assert [await ask(pool) for _ in range(4)] == ["b"] * 4
        pool.links["b"].in_flight -= 100
        assert "a" in pool.links
        leaving.gate.set()
        assert await old == "a"
        await eventually(lambda: set(pool.links) == {"b"})
        await eventually(lambda: leaving.server.statistics().connections == 0)
        await leaving.server.close()


async def test_a_replica_that_is_named_again_is_used_again(cluster: Cluster) -> None:
    replica = await cluster.add("a", open_gate=False)
    async with pooled(cluster) as pool:
        old = asyncio.create_task(ask(pool))
        await eventually(lambda: replica.held == 1)
        del cluster.replicas["a"]
        await eventually(lambda: not pool.links["a"].named)
        new = asyncio.create_task(ask(pool))
        cluster.replicas["a"] = replica
        await eventually(lambda: replica.held == 2)
        replica.gate.set()
        assert await asyncio.gather(old, new) == ["a", "a"]


async def test_giving_up_a_link_closes_it_and_asks_discovery(cluster: Cluster) -> None:
    replica = await cluster.add("a")
    async with pooled(cluster, NEVER_S) as pool:
        (link,) = pool.links.values()
        pool.forget(link)
        assert "a" not in pool.links
        await eventually(lambda: "a" in pool.links)
        assert pool.links["a"] is not link
        await eventually(lambda: link.client.closed)
        await eventually(lambda: replica.server.statistics().connections == 1)
        assert await ask(pool) == "a"


# Errors that are nobody's death


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", retry_after_s=3.0),
        InvalidTensorError("wrong"),
        UnavailableError("no experts behind me", retry_after_s=2.0),
        RequestCancelledError("cancelled"),
        LinkProtocolError("a peer of the handler"),
        DeadlineExceededError("the handler's own"),
    ],
    ids=lambda error: error.code,
)
async def test_what_the_handler_raises_is_passed_on(cluster: Cluster, error: PimoeError) -> None:
    for name in "ab":
        (await cluster.add(name)).outcome = error
    async with pooled(cluster) as pool:
        with pytest.raises(PimoeError) as raised:
            await ask(pool)
        assert raised.value.to_wire() == error.to_wire()
        assert type(raised.value) is type(error)
        assert sum(replica.server.calls for replica in cluster.replicas.values()) == 1
        assert pool.statistics() == (2, 0, 0)


async def test_what_cannot_be_sent_is_nobodys_death(cluster: Cluster) -> None:
    await cluster.add("a")
    async with pooled(cluster, limits=LinkLimits(max_body_bytes=2**20)) as pool:
        with pytest.raises(LinkProtocolError, match="needs 8 B, has 4"):
            await pool.call("m", {}, [TensorData("float32", (2,), bytes(4))], soon())
        with pytest.raises(PayloadTooLargeError):
            await pool.call("m", {}, [TensorData("int32", (2**19,), bytes(2**21))], soon())
        assert pool.statistics() == (1, 0, 0)
        reply = await pool.call("m", {}, [tensor([1.0])], soon())
        assert bytes(reply.tensors[0].data) == tensor([1.0]).data


# Discovery that fails


async def test_discovery_may_raise_and_is_asked_again(cluster: Cluster) -> None:
    await cluster.add("a")
    cluster.failures = [RuntimeError("actor died"), KeyError("x"), TimeoutError(), OSError()]
    async with pooled(cluster) as pool:
        assert await ask(pool) == "a"
        cluster.failures = [RuntimeError("actor died")] * 3
        await cluster.add("b")
        await eventually(lambda: set(pool.links) == {"a", "b"})  # links live on meanwhile
        assert not cluster.failures


async def test_odd_endpoints_cost_nobody_else(cluster: Cluster) -> None:
    odd = ("unix:/nonexistent", "tcp:host", "tcp:127.0.0.1:99999", "unix:\0", "tcp:127.0.0.1:1", "pigeon:1")
    cluster.extra = [Endpoint(f"odd-{n}", "node", (address,)) for n, address in enumerate(odd)]
    cluster.extra += [Endpoint("far", "another node", ("unix:/x",)), Endpoint("bare", "node", ())]
    await cluster.add("a")
    async with pooled(cluster) as pool:
        assert await ask(pool) == "a"
        rounds = cluster.rounds
        await eventually(lambda: cluster.rounds > rounds + 2)
        assert set(pool.links) == {"a"}


async def test_discovery_that_gives_nonsense_is_survived(cluster: Cluster) -> None:
    await cluster.add("a")
    nonsense: list[Any] = [None, 7, ["text"], [None], [[]], {"a": 1}]

    async def discover() -> Any:
        return nonsense.pop() if nonsense else await cluster.discover()

    pool = LinkPool("group-0", discover, SECRET, "node", refresh_s=0.001)
    await pool.start()
    assert await ask(pool) == "a"
    await pool.close()


async def test_a_replica_that_does_not_answer_keeps_nobody_from_being_found(cluster: Cluster) -> None:
    await cluster.add("a")
    limits = LinkLimits(handshake_timeout_s=NEVER_S)
    mute = scripted_server(lambda peer, frame: None)
    async with mute as (address, peers), pooled(cluster, limits=limits) as pool:
        cluster.extra.append(Endpoint("hung", "node", (address,)))
        await eventually(lambda: peers)
        await cluster.add("b")
        await eventually(lambda: set(pool.links) == {"a", "b"})
        rounds = cluster.rounds
        await eventually(lambda: cluster.rounds > rounds + 3)
        assert len(peers) == 1  # and it is not asked again and again


async def test_wrong_secrets_link_nobody(cluster: Cluster) -> None:
    await cluster.add("a")
    pool = LinkPool("group-0", cluster.discover, b"wrong", "node", refresh_s=0.01)
    await pool.start()
    with pytest.raises(UnavailableError):
        await ask(pool, at_once())
    await pool.close()


# Closing


async def test_closing_fails_who_waits_and_who_is_at_work(cluster: Cluster) -> None:
    replica = await cluster.add("a", credits=1, open_gate=False)
    async with pooled(cluster) as pool:
        calls = [asyncio.create_task(ask(pool)) for _ in range(3)]
        await eventually(lambda: replica.held == 1)
        await pool.close()
        for outcome in await within_patience(asyncio.gather(*calls, return_exceptions=True)):
            assert isinstance(outcome, UnavailableError)
        with pytest.raises(UnavailableError, match="shutting down"):
            await ask(pool)
        assert pool.statistics().replicas == 0
        await eventually(lambda: replica.server.statistics() == (0, 0, 1, 1, 0))


async def test_a_pool_may_be_closed_while_it_starts_or_before(cluster: Cluster) -> None:
    async def hang() -> Sequence[Endpoint]:
        await asyncio.Event().wait()
        return []

    pool = LinkPool("group-0", hang, SECRET, "node")
    starting = asyncio.create_task(pool.start())
    await eventually(lambda: pool._task is not None)
    await pool.close()
    await within_patience(starting)
    await LinkPool("group-0", hang, SECRET, "node").close()


async def test_changes_are_told(cluster: Cluster) -> None:
    async with pooled(cluster) as pool:
        told = asyncio.Event()
        pool.on_change = lambda: told.set() if pool.links else None
        await cluster.add("a")
        await within_patience(told.wait())


async def test_an_observer_that_raises_harms_nobody(cluster: Cluster) -> None:
    complaints: list[Any] = []
    loop = asyncio.get_running_loop()
    watch = loop._exception_handler  # type: ignore[attr-defined]
    loop.set_exception_handler(lambda _, context: complaints.append(context["exception"]))
    async with pooled(cluster) as pool:
        pool.on_change = lambda: 1 / 0  # type: ignore[assignment, return-value]
        await cluster.add("a")
        assert await ask(pool) == "a"
        rounds = cluster.rounds
        await eventually(lambda: cluster.rounds > rounds + 2)
    await eventually(lambda: complaints)
    assert {type(error) for error in complaints} == {ZeroDivisionError}
    await asyncio.sleep(0)
    loop.set_exception_handler(watch)


@pytest.mark.parametrize("seed", range(3))
async def test_every_call_has_one_outcome_while_replicas_come_and_go(cluster: Cluster, seed: int) -> None:
    chance = random.Random(seed)
    for name in ("r0", "r1"):
        await cluster.add(name, credits=4)
    async with pooled(cluster, refresh_s=0.005) as pool:
        calls = [asyncio.create_task(ask(pool)) for _ in range(50)]
        for n in range(2, 10):
            await cluster.add(f"r{n}", credits=4, open_gate=chance.random() < 0.7)
            calls += [asyncio.create_task(ask(pool)) for _ in range(20)]
            for _ in range(chance.randrange(40)):
                await asyncio.sleep(0)
            await cluster.kill(chance.choice(sorted(cluster.replicas)))
        for replica in cluster.replicas.values():
            replica.gate.set()
        answers = await within_patience(asyncio.gather(*calls))
        assert len(answers) == 50 + 8 * 20
        assert pool.statistics().in_flight == 0
