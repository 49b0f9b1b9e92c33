"""The second level against a real server: what it gives, and everything that can be wrong with it."""

from __future__ import annotations

import asyncio
import builtins
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from pimoe.runtime.caching.entry import SCHEMA, CachedAnswer
from pimoe.runtime.caching.redis_level import RedisLevel
from pimoe.runtime.caching.redis_limits import RedisLimits
from pimoe.runtime.caching.redis_names import RedisNames
from pimoe.runtime.caching.result_cache import EntryTags
from pimoe.runtime.caching.second_level import Found
from pimoe.runtime.errors import ConfigurationError, UnavailableError
from pimoe.runtime.requests import InferResult, TensorData, TokenChunk
from redis_server import RedisServer, redis_server
from waiting import eventually, nothing_left_behind

__all__ = ["nothing_left_behind", "redis_server"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TAGS = EntryTags("model", "tenant")
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
ANSWER = CachedAnswer("id", 7, (TokenChunk((1, 2), "stop"),))
SECRET = "0f" * 32
PATIENT = {"lookup_timeout_s": 10.0, "command_timeout_s": 10.0, "breaker_failures": 1000}

Open = Callable[..., RedisLevel]


@pytest.fixture
async def open_level(redis_server: RedisServer) -> AsyncIterator[Open]:
    """Opens levels on the test's server, as gateways would, and closes them."""
    levels: list[RedisLevel] = []

    def make(**options: Any) -> RedisLevel:
        levels.append(RedisLevel(RedisLimits(**{"url": redis_server.url, **PATIENT, **options})))
        return levels[-1]

    yield make
    redis_server.resume()
    for level in levels:
        await level.close()


def whatever(_: CachedAnswer) -> bool:
    return True


async def get(level: RedisLevel, key: bytes = KEY, tags: EntryTags = TAGS) -> Found:
    return await level.get(key, tags, whatever)


async def store(
    level: RedisLevel, key: bytes = KEY, tags: EntryTags = TAGS, answer: CachedAnswer = ANSWER
) -> None:
    """Look up, miss, and put what was computed, as `CachedBackend` does."""
    found = await get(level, key, tags)
    assert found.answer is None
    assert found.ticket is not None
    written = level.statistics().written
    level.put(key, tags, answer, 100, found.ticket)
    await eventually(lambda: level.statistics().written == written + 1)


async def answered(level: RedisLevel, key: bytes = KEY) -> CachedAnswer:
    """The answer, after lookups that were too late, perhaps."""
    while (found := await get(level, key)).answer is None:  # noqa: ASYNC110 (each asks)
        await asyncio.sleep(0.005)
    return found.answer


def misses(level: RedisLevel) -> dict[str, int]:
    return {reason: count for reason, count in level.statistics().misses.items() if count}


def dropped(level: RedisLevel) -> dict[str, int]:
    return {reason: count for reason, count in level.statistics().dropped.items() if count}


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"encryption_key": SECRET}])
async def test_one_gateway_stores_and_another_finds(open_level: Open, options: dict[str, Any]) -> None:
    one, another = open_level(**options), open_level(**options)
    await store(one)
    found = await get(another)
    assert found.answer == ANSWER
    assert 86_000 < found.remaining_s <= 86_400
    assert (another.statistics().hits, misses(another)) == (1, {})
    assert another.statistics().read_bytes == one.statistics().written_bytes > 0
    assert (one.statistics().hits, misses(one)) == (0, {"absent": 1})


async def test_large_answers_pass_through_a_thread(open_level: Open) -> None:
    level = open_level()
    output = TensorData("int32", (250, 1000), bytes(1_000_000))
    answer = CachedAnswer("id", 7, (InferResult(output),))
    ticket = (await get(level)).ticket
    assert ticket is not None
    level.put(KEY, TAGS, answer, 1_000_000, ticket)
    await eventually(lambda: level.statistics().written == 1)
    assert (await get(level)).answer == answer


async def test_keys_tenants_and_models_are_apart(open_level: Open) -> None:
    level = open_level()
    await store(level)
    for key, tags in ((OTHER_KEY, TAGS), (KEY, TAGS._replace(tenant="b")), (KEY, TAGS._replace(model="b"))):
        assert (await get(level, key, tags)).answer is None
    assert misses(level) == {"absent": 4}
    assert (await get(open_level(namespace="other"))).answer is None


async def test_the_server_forgets_in_time(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level(ttl_s=0.05)
    await store(level)
    await eventually(lambda: not redis_server.entries())
    assert (await get(level)).answer is None
    assert misses(level) == {"absent": 2}


async def test_what_does_not_fit_is_no_hit(open_level: Open) -> None:
    level = open_level()
    await store(level)
    assert (await level.get(KEY, TAGS, lambda answer: answer != ANSWER)).answer is None
    assert (level.statistics().hits, misses(level)) == (0, {"absent": 1, "corrupt": 1})


# What may lie there instead


def set_raw(server: RedisServer, change: Callable[[bytes], bytes]) -> None:
    (name,) = server.entries()
    with server.raw() as client:
        client.set(name, change(client.get(name)), keepttl=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda value: value[:-1] + bytes([value[-1] ^ 1]), "corrupt"),
        (lambda value: value[:-1], "corrupt"),
        (lambda value: value + b"x", "corrupt"),
        (lambda value: value[:16], "corrupt"),
        (lambda value: value[:19] + bytes([SCHEMA + 1]) + value[20:], "version"),
        (lambda value: b"x" * 200, "stale"),
        (lambda value: b"x", "stale"),
        (lambda value: value + bytes(20 * 2**20), "too_large"),
    ],
)
@pytest.mark.parametrize("key", ["", SECRET])
async def test_a_value_that_is_damaged_is_a_miss(
    open_level: Open, redis_server: RedisServer, change: Callable[[bytes], bytes], reason: str, key: str
) -> None:
    level = open_level(encryption_key=key)
    await store(level)
    set_raw(redis_server, change)
    found = await get(level)
    assert found.answer is None
    expected = "undecryptable" if key and reason == "corrupt" and len(change(bytes(100))) > 50 else reason
    assert misses(level) == {"absent": 1, expected: 1}
    assert level.statistics().read_bytes < 17 * 2**20
    level.put(KEY, TAGS, ANSWER, 100, found.ticket or b"")  # what is computed instead mends it
    await eventually(lambda: level.statistics().written == 2)
    assert (await get(level)).answer == ANSWER


@pytest.mark.parametrize("key", ["", SECRET])
@pytest.mark.parametrize("whose", ["key", "tenant"])
async def test_an_entry_in_anothers_place_is_a_miss(
    open_level: Open, redis_server: RedisServer, key: str, whose: str
) -> None:
    level = open_level(encryption_key=key)
    other = (OTHER_KEY, TAGS) if whose == "key" else (KEY, TAGS._replace(tenant="b"))
    await store(level)
    (own,) = redis_server.entries()
    await store(level, *other)
    (others,) = set(redis_server.entries()) - {own}
    with redis_server.raw() as client:
        mine, theirs = client.get(own), client.get(others)
        # Even with their ticket in front: the tenant, too, is bound into the entry.
        client.set(others, theirs[:16] + mine[16:], keepttl=True)  # type: ignore[index]
    assert (await get(level, *other)).answer is None
    assert misses(level) == {"absent": 2, "undecryptable" if key else "corrupt": 1}


async def test_things_of_other_types_are_misses(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level()
    await store(level)
    (name,) = redis_server.entries()
    with redis_server.raw() as client:
        client.persist(name)  # ours never live for ever
        assert (await get(level)).answer is None
        client.delete(name)
        client.lpush(name, b"x")
        assert (await get(level)).answer is None
    assert misses(level) == {"absent": 1, "corrupt": 1, "refused": 1}
    await replaced(level, await get(level))
    assert misses(level)["refused"] == 2


async def replaced(level: RedisLevel, found: Found) -> None:
    """What is computed instead is stored and found."""
    assert found.ticket is not None
    level.put(KEY, TAGS, ANSWER, 100, found.ticket)
    await eventually(lambda: not level._pending and not level._running)
    assert (await get(level)).answer == ANSWER


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("kind", ["list", "short string"])
async def test_a_generation_of_a_foreign_type_is_overwritten(
    open_level: Open, redis_server: RedisServer, which: int, kind: str
) -> None:
    level = open_level()
    await store(level)
    name = RedisNames("pimoe").generations(TAGS)[which]
    with redis_server.raw() as client:
        client.delete(name)
        client.lpush(name, b"x") if kind == "list" else client.set(name, b"x")
    found = await get(level)
    assert found.answer is None
    assert misses(level) == {"absent": 1, "refused": 1}
    await replaced(level, found)
    assert misses(level) == {"absent": 1, "refused": 1}
    assert dropped(level) == {}
    with redis_server.raw() as client:
        assert client.pttl(name) > 0  # type: ignore[operator]


async def test_a_generation_that_cannot_be_overwritten_is_counted(
    open_level: Open, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = open_level()
    with redis_server.raw() as client:
        client.lpush("pimoe:g:a", b"x")

    async def begin(client: Any, generations: Any, only_missing: bool = False) -> list[Any]:
        return [None] * len(generations)  # as where somebody else keeps writing there

    monkeypatch.setattr(level, "_begin", begin)
    for count in (1, 2):
        assert await get(level) == Found()
        assert (misses(level), dropped(level)) == ({"refused": count}, {"refused": count})


async def test_gateways_with_different_keys_share_nothing(open_level: Open) -> None:
    one, another, open_one = (open_level(encryption_key=key) for key in (SECRET, "0e" * 16, ""))
    await store(one)
    for level in (another, open_one):
        assert (await get(level)).answer is None
        assert misses(level) == {"undecryptable": 1}


async def test_a_server_with_a_key_never_sees_an_answer(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level(encryption_key=SECRET, compression="none")
    await store(level, answer=replace(ANSWER, response_id="SEE-ME"))
    held = redis_server.everything()
    assert len(held) == 4
    assert not any(b"SEE-ME" in part or b"tenant" in part for part in (*held, *held.values()))


# Flushes


async def test_a_flush_reaches_what_it_names(open_level: Open, redis_server: RedisServer) -> None:
    level, gateway = open_level(), open_level()
    everyone = [EntryTags(model, tenant) for model in "ab" for tenant in "xy"]
    flushes: list[tuple[dict[str, str], set[EntryTags]]] = [
        ({"tenant": "x"}, {t for t in everyone if t.tenant == "x"}),
        ({"model": "a"}, {t for t in everyone if t.model == "a"}),
        ({}, set(everyone)),
        ({"tenant": "nobody"}, set()),
    ]
    for scope, gone in flushes:
        for tags in everyone:
            if (await get(level, KEY, tags)).answer is None:
                await store(level, KEY, tags)
        assert await level.flush(**scope) == len(gone)
        for tags in everyone:
            assert ((await get(gateway, KEY, tags)).answer is None) == (tags in gone)
    assert level.statistics().flushes == 4


async def test_a_flush_of_both_deletes_what_both_name(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level()
    for model in "ab":
        await store(level, KEY, EntryTags(model, "x"))
    assert await level.flush("a", "x") == 1
    assert len(redis_server.entries()) == 1
    assert (await get(level, KEY, EntryTags("a", "x"))).answer is None


async def test_what_was_begun_before_a_flush_is_never_given(open_level: Open, redis_server: RedisServer) -> None:
    slow, gateway = open_level(), open_level()
    ticket = (await get(slow)).ticket
    assert ticket is not None
    assert await gateway.flush() == 0
    slow.put(KEY, TAGS, ANSWER, 100, ticket)
    await eventually(lambda: slow.statistics().written == 1)
    assert len(redis_server.entries()) == 1
    for level in (slow, gateway):
        assert (await get(level)).answer is None
        assert misses(level).get("stale") == 1


async def test_a_generation_that_the_server_lost_makes_misses(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level()
    await store(level)
    with redis_server.raw() as client:
        client.delete("pimoe:g:a")  # as a server out of memory would
    assert (await get(level)).answer is None
    with redis_server.raw() as client:
        client.delete(*redis_server.entries())
    await store(level)
    assert (await get(level)).answer == ANSWER


async def test_a_flush_that_does_not_arrive_is_an_error(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level(command_timeout_s=0.2)
    await store(level)
    redis_server.kill()
    with pytest.raises(UnavailableError):
        await level.flush()
    assert level.statistics().flushes == 0


async def test_a_flush_of_thousands_deletes_them_all(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level()
    await store(level)
    (name,) = redis_server.entries()
    with redis_server.raw() as client:
        client.mset({f"{name[:-8]}{n:08}": b"x" for n in range(3000)})
        client.set("someone:elses", b"x")
    assert await level.flush(tenant=TAGS.tenant) == 3001
    with redis_server.raw() as client:
        assert client.get("someone:elses") == b"x"


# A server that is away, slow, or back


async def test_a_server_that_is_killed_costs_misses_and_then_nothing(
    open_level: Open, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    level = open_level(breaker_failures=3, breaker_retry_s=1000.0)
    await store(level)
    redis_server.kill()
    for _ in range(6):
        assert await get(level) == Found()
    assert misses(level) == {"absent": 1, "unavailable": 3, "open": 3}
    assert (level.statistics().breaker_open, level.statistics().breaker_opened) == (1, 1)
    level.put(KEY, TAGS, ANSWER, 100, b"t" * 16)
    await eventually(lambda: dropped(level) == {"open": 1})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_a_restarted_server_is_found_again(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level(breaker_failures=2, breaker_retry_s=0.01)
    await asyncio.gather(*(get(level, bytes([n]) * 32) for n in range(8)))  # several connections
    await store(level)
    redis_server.kill()
    for _ in range(3):
        await get(level)
    assert level.statistics().breaker_open == 1
    redis_server.start()

    async def answers() -> bool:
        return (await get(level)).ticket is not None

    while not await answers():  # noqa: ASYNC110 (each is a probe)
        await asyncio.sleep(0.005)
    assert level.statistics().breaker_open == 0
    assert (await get(level)).answer is None  # it holds nothing any more
    await store(level)
    assert (await get(level)).answer == ANSWER


async def test_a_server_that_hangs_costs_no_more_than_the_deadline(
    open_level: Open, redis_server: RedisServer
) -> None:
    level = open_level(lookup_timeout_s=0.05, breaker_failures=1000, max_connections=4)
    patient = open_level()
    await store(patient)
    await answered(level)  # connecting takes its time
    await eventually(lambda: not level._running)
    before = level.statistics().misses
    redis_server.pause()
    outcomes = await asyncio.gather(*(get(level) for _ in range(12)))
    assert outcomes == [Found()] * 12
    late = level.statistics().misses
    assert sum(late[reason] - before[reason] for reason in ("timeout", "busy")) == 12
    redis_server.resume()
    with redis_server.raw() as client:
        own, patients = 1, 3
        assert len(client.client_list()) <= 4 + own + patients
    # What was late is given to nobody else: the right answer, under each key.
    other = replace(ANSWER, response_id="other")
    await store(patient, OTHER_KEY, answer=other)
    await eventually(lambda: not level._running)
    for key, answer in ((KEY, ANSWER), (OTHER_KEY, other)) * 10:
        assert await answered(level, key) == answer


async def test_a_cancelled_lookup_disturbs_no_other(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level(max_connections=1)
    await store(level)
    other = replace(ANSWER, response_id="other")
    await store(level, OTHER_KEY, answer=other)
    for turns in range(12):
        lookup = asyncio.create_task(get(level))
        for _ in range(turns):
            await asyncio.sleep(0)
        lookup.cancel()
        await asyncio.gather(lookup, return_exceptions=True)
        await eventually(lambda: not level._running)
        assert (await get(level, OTHER_KEY)).answer == other


async def test_writes_never_wait_for_the_server(open_level: Open, redis_server: RedisServer) -> None:
    level = open_level(max_pending_entries=3, command_timeout_s=0.1)
    ticket = (await get(level)).ticket
    assert ticket is not None
    redis_server.pause()
    for n in range(10):
        level.put(bytes([n]) * 32, TAGS, ANSWER, 100, ticket)
    assert dropped(level) == {"full": 7}
    await eventually(lambda: dropped(level) == {"full": 7, "timeout": 3})
    level.put(KEY, TAGS, ANSWER, 17 * 2**20, ticket)
    assert dropped(level)["too_large"] == 1


async def test_a_server_that_refuses_is_not_taken_for_a_dead_one(
    open_level: Open, redis_server: RedisServer
) -> None:
    level = open_level(breaker_failures=1)
    ticket = (await get(level)).ticket
    assert ticket is not None
    with redis_server.raw() as client:
        client.config_set("maxmemory", 1)
    level.put(KEY, TAGS, ANSWER, 100, ticket)
    await eventually(lambda: dropped(level) == {"refused": 1})
    assert level.statistics().breaker_open == 0
    assert (await get(level)).ticket == ticket


async def test_nobody_at_the_address() -> None:
    level = RedisLevel(RedisLimits("redis://127.0.0.1:1"))
    assert await get(level) == Found()
    assert misses(level) == {"unavailable": 1}
    await level.close()


# Settings


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"url": "http://:hunter2@host"}, "url"),
        ({"url": "hunter2"}, "url"),
        ({"url": "redis://:hunter2@host:port"}, "url"),
        ({"lookup_timeout_s": 0}, "lookup_timeout_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"max_connections": -1}, "max_connections"),
        ({"namespace": "a*"}, "namespace"),
        ({"namespace": ""}, "namespace"),
        ({"compression": "gzip"}, "compression"),
        ({"encryption_key": "hunter2"}, "encryption_key"),
    ],
)
def test_wrong_limits_are_named_and_secrets_are_not_shown(options: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        RedisLimits(**{"url": "redis://host", **options})
    assert raised.value.param == param
    assert "hunter2" not in raised.value.message


def test_secrets_are_not_shown() -> None:
    limits = RedisLimits("rediss://user:hunter2@host/3?password=hunter2", encryption_key=SECRET)
    assert "hunter2" not in repr(limits)
    assert SECRET not in repr(limits)
    assert limits.shown == "rediss://host:6379"
    assert RedisLimits("unix:///run/redis.sock?db=1").shown == "unix:///run/redis.sock"


async def test_a_wrong_option_in_the_url_is_named_without_it() -> None:
    with pytest.raises(ConfigurationError) as raised:
        RedisLevel(RedisLimits("redis://:hunter2@host/0?socket_timeout=hunter2"))
    assert "hunter2" not in raised.value.message
    assert raised.value.__cause__ is None


async def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_redis(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == "redis":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", no_redis)
    with pytest.raises(ConfigurationError, match=r"pimoe\[cache\]"):
        RedisLevel(RedisLimits("redis://host"))
