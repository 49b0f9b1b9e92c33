"""A cached answer is the computed one byte for byte, in every format and from either level; only the headers that
say who asked and who answered differ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from fake_gateway import HIDDEN, ByteCodec, FakeGateway, Reply, ask, doubled, echo
from fake_second_level import FakeSecondLevel
from pimoe.deployments.api.known_answers import KnownAnswers
from pimoe.runtime.caching import (
    BypassReason,
    CachedBackend,
    CacheLimits,
    RedisLevel,
    RedisLimits,
    ResultCache,
)
from pimoe.runtime.generation.stopping import StoppingBackend
from pimoe.runtime.requests import (
    GenerateAnswer,
    GenerateRequest,
    InferAnswer,
    InferRequest,
    InferResult,
    ModelInfo,
    TokenChunk,
)
from redis_server import RedisServer, redis_server
from waiting import eventually

__all__ = ["redis_server"]


class EchoBackend:
    """Answers as `FakeGateway` does, when it may; each choice at a pace of its own."""

    def __init__(self, model: ModelInfo) -> None:
        self.model = model
        self.gate = asyncio.Event()
        self.gate.set()
        self.computed = 0

    async def infer(self, request: InferRequest) -> InferResult:
        self.computed += 1
        await self.gate.wait()
        return InferResult(doubled(request.hidden_states))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self.computed += 1
        pace = self.computed % 4
        await self.gate.wait()
        for chunk in echo(request, size=1 + request.sampling.seed % 3):
            yield chunk
            for _ in range(pace):
                await asyncio.sleep(0)


class CachedGateway(FakeGateway):
    """A gateway with the real cache in it."""

    def __init__(self, backend: EchoBackend, second: Any = None) -> None:
        super().__init__()
        cache: Any = ResultCache(CacheLimits())
        seconds = iter(range(1_000, 100_000, 7))
        stopping = StoppingBackend(backend, ByteCodec())
        self.cached = CachedBackend(stopping, cache, second, wall_clock=lambda: next(seconds))
        self.known: KnownAnswers = KnownAnswers()

    def recall(self, hits: Sequence[object]) -> bool:
        return self.cached.recall(hits)

    async def infer(self, request: InferRequest, bypass: BypassReason | None) -> InferAnswer:
        return await self.cached.infer(request, bypass)

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None) -> GenerateAnswer:
        return await self.cached.generate(request, bypass)


STATES = (np.arange(3 * HIDDEN, dtype=np.float32).reshape(3, HIDDEN) / 7 - 1.3).astype(np.float32)
TENSOR = {"name": "hidden_states", "shape": [3, HIDDEN], "datatype": "FP32"}
AS_JSON = {"inputs": [{**TENSOR, "data": STATES.ravel().tolist()}]}
HEAD = orjson.dumps({"inputs": [{**TENSOR, "parameters": {"binary_data_size": STATES.nbytes}}], "id": "mine"})
MSGPACK = {"content-type": "application/msgpack"}
INFER = "/v2/models/echo/infer"
USER = [{"role": "user", "content": "héllo wörld"}]


def binary(output: bool) -> tuple[str, bytes, dict[str, str]]:
    head = orjson.loads(HEAD) | {"parameters": {"binary_data_output": output, "layer": 2}}
    packed = orjson.dumps(head)
    return INFER, packed + STATES.tobytes(), {"inference-header-content-length": str(len(packed))}


def completion(**fields: Any) -> tuple[str, bytes, dict[str, str]]:
    body = {"model": "echo", "prompt": "héllo", "max_tokens": 9, "temperature": 0, **fields}
    return "/v1/completions", orjson.dumps(body), {}


def chat(**fields: Any) -> tuple[str, bytes, dict[str, str]]:
    body = {"model": "echo", "messages": USER, "max_tokens": 30, "seed": 5, **fields}
    return "/v1/chat/completions", orjson.dumps(body), {}


AS_MSGPACK = {"inputs": [{**TENSOR, "data": STATES.tobytes()}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}

FORMATS: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "infer json": (INFER, orjson.dumps(AS_JSON), {}),
    "infer msgpack": (INFER, msgpack.packb(AS_MSGPACK), MSGPACK),
    "infer binary": binary(output=True),
    "infer binary to json": binary(output=False),
    "completion": completion(),
    "completion logprobs": completion(logprobs=3),
    "completion n": completion(n=3, seed=4, temperature=0.7),
    "completion greedy n": completion(n=3),
    "completion prompts": completion(prompt=["one", "two", "one"], logprobs=1),
    "completion stop": completion(stop=["llo"], return_token_ids=True),
    "completion stream": completion(**STREAM),
    "completion stream logprobs": completion(**STREAM, logprobs=2),
    "completion stream n": completion(**STREAM, n=4, seed=4, temperature=0.7, max_tokens=20),
    "completion stream prompts": completion(**STREAM, prompt=["a", "longer", "one"], return_token_ids=True),
    "chat": chat(),
    "chat logprobs": chat(logprobs=True, top_logprobs=2),
    "chat n": chat(n=2),
    "chat stream": chat(**STREAM),
    "chat stream logprobs": chat(stream=True, logprobs=True, top_logprobs=2),
    "chat stream n": chat(**STREAM, n=3),
}


@pytest.fixture(params=list(FORMATS))
def call(request: pytest.FixtureRequest) -> tuple[str, bytes, dict[str, str]]:
    return FORMATS[request.param]


async def send(gateway: FakeGateway, call: tuple[str, bytes, dict[str, str]]) -> Reply:
    path, body, headers = call
    reply = await ask(gateway, "POST", path, body, headers)
    assert (reply.status, reply.complete) == (200, True), reply.body
    return reply


def assert_same(computed: Reply, other: Reply, outcome: str) -> None:
    assert (computed.headers.pop("x-pimoe-cache"), other.headers.pop("x-pimoe-cache")) == ("miss", outcome)
    assert computed.headers.pop("x-request-id") != other.headers.pop("x-request-id")
    assert computed.headers == other.headers
    assert computed.body == other.body
    assert len(computed.body) > 50


def opened() -> tuple[EchoBackend, CachedGateway]:
    model = FakeGateway().info
    assert model is not None
    backend = EchoBackend(model)
    return backend, CachedGateway(backend)


async def test_from_memory(call: tuple[str, bytes, dict[str, str]]) -> None:
    backend, gateway = opened()
    computed = await send(gateway, call)
    count = backend.computed
    assert_same(computed, await send(gateway, call), "hit")
    assert backend.computed == count


async def test_from_what_was_sent_before(call: tuple[str, bytes, dict[str, str]]) -> None:
    backend, gateway = opened()
    computed = await send(gateway, call)
    await send(gateway, call)
    count, hits = backend.computed, gateway.cached.statistics().memory.hits
    streams = b"stream" in call[1]
    assert len(gateway.known) == (0 if streams else 1)
    assert_same(computed, await send(gateway, call), "hit")
    assert backend.computed == count
    assert gateway.cached.statistics().memory.hits == 2 * hits  # counted as the long way counts it


async def test_what_was_sent_before_is_given_as_long_as_the_cache_gives_it() -> None:
    backend, gateway = opened()
    call = FORMATS["infer binary"]

    async def outcomes(*times: str) -> None:
        assert [(await send(gateway, call)).headers["x-pimoe-cache"] for _ in times] == list(times)

    await outcomes("miss", "hit", "hit")
    gateway.cached.flush()
    await outcomes("miss", "hit", "hit")
    gateway.cached.flush(tenant="another")
    await outcomes("hit")
    gateway.cached.flush(tenant="")
    await outcomes("miss", "hit", "hit")
    gateway.cached.cache.limits = replace(gateway.cached.cache.limits, ttl_s=0.0)
    await outcomes("miss", "miss")
    gateway.cached.cache.limits = CacheLimits()
    await outcomes("miss", "hit", "hit")
    gateway.cached.cache.limits = CacheLimits(max_bytes=0)
    await outcomes("bypass", "bypass")
    gateway.cached.cache.limits = CacheLimits()
    await outcomes("miss", "hit", "hit")
    backend.model = replace(backend.model, weights_digest="other")
    await outcomes("miss", "hit", "hit")


async def test_what_was_sent_before_is_for_equal_requests_only() -> None:
    backend, gateway = opened()
    path, body, headers = FORMATS["infer binary"]
    for _ in range(3):
        await send(gateway, (path, body, headers))
    other = body[:-1] + bytes([body[-1] ^ 1])
    for changed in (
        (path, other, headers),
        (path, body, {**headers, "x-pimoe-tenant": "a"}),
        (path, body, {**headers, "x-pimoe-tenant": "b"}),
    ):
        count = backend.computed
        outcomes = [(await send(gateway, changed)).headers["x-pimoe-cache"] for _ in range(3)]
        assert outcomes == ["miss", "hit", "hit"]
        assert backend.computed == count + 1
    assert (await send(gateway, (path, body, {**headers, "x-pimoe-cache": "false"}))).headers[
        "x-pimoe-cache"
    ] == "bypass"
    refused = await ask(gateway, "POST", path, body, {**headers, "x-pimoe-priority": "9"})
    assert refused.status == 400
    missing = await ask(gateway, "POST", "/v2/models/another/infer", body, headers)
    assert missing.status == 404


async def test_a_chat_that_tells_the_time_is_written_each_time() -> None:
    _, gateway = opened()
    gateway.reads_clock = True
    for _ in range(3):
        await send(gateway, FORMATS["chat"])
    assert len(gateway.known) == 0


async def test_joined_to_the_one_under_way(call: tuple[str, bytes, dict[str, str]]) -> None:
    backend, gateway = opened()
    backend.gate.clear()
    asking = []
    for joined in range(2):
        asking.append(asyncio.create_task(send(gateway, call)))
        await eventually(lambda: backend.computed)
        for _ in range(50 * (1 + joined)):
            await asyncio.sleep(0)
    count = backend.computed
    backend.gate.set()
    computed, other = await asyncio.gather(*asking)
    assert_same(computed, other, "coalesced")
    assert backend.computed == count


async def test_from_the_second_level(call: tuple[str, bytes, dict[str, str]]) -> None:
    backend, _ = opened()
    second = FakeSecondLevel()
    computed = await send(CachedGateway(backend, second), call)
    count = backend.computed
    assert_same(computed, await send(CachedGateway(backend, second), call), "hit")
    assert backend.computed == count


@pytest.mark.parametrize("key", ["", "0f" * 32], ids=["plain", "encrypted"])
async def test_from_a_real_server(redis_server: RedisServer, key: str) -> None:
    limits = RedisLimits(redis_server.url, lookup_timeout_s=10.0, encryption_key=key)
    backend, _ = opened()
    levels = [RedisLevel(limits) for _ in range(2)]
    one, another = (CachedGateway(backend, level) for level in levels)
    for call in FORMATS.values():
        one.cached.flush()
        another.cached.flush()
        await levels[0].flush()
        computed = await send(one, call)
        await eventually(lambda: not levels[0]._pending and not levels[0]._running)
        assert_same(computed, await send(another, call), "hit")
    for level in levels:
        await level.close()


async def test_what_a_stop_string_cuts_is_stored_up_to_there() -> None:
    """And no further: below the cache the generation ends with the token that completes the stop string."""
    _, gateway = opened()
    replies = [await send(gateway, FORMATS["completion stop"]) for _ in range(2)]
    assert_same(*replies, "hit")
    choice = orjson.loads(replies[1].body)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hé", "stop", "llo")
    assert choice["token_ids"] == list("héllo".encode())


async def test_other_stop_strings_are_another_question() -> None:
    _, gateway = opened()
    outcomes = [
        (await send(gateway, completion(stop=stop))).headers["x-pimoe-cache"]
        for stop in (["llo"], None, ["llo", "x"], ["x", "llo"], "llo")
    ]
    assert outcomes == ["miss", "miss", "miss", "hit", "hit"]


async def test_how_a_stop_is_shown_is_no_other_question() -> None:
    _, gateway = opened()
    replies = [
        await send(gateway, completion(stop="llo", include_stop_str_in_output=shown)) for shown in (False, True)
    ]
    assert [reply.headers["x-pimoe-cache"] for reply in replies] == ["miss", "hit"]
    assert [orjson.loads(reply.body)["choices"][0]["text"] for reply in replies] == ["hé", "héllo"]


async def test_whole_and_streamed_share_one_entry() -> None:
    _, gateway = opened()
    outcomes = [
        (await send(gateway, FORMATS[name])).headers["x-pimoe-cache"]
        for name in ("completion", "completion stream", "chat stream", "chat", "infer msgpack", "infer json")
    ]
    assert outcomes == ["miss", "hit"] * 3
