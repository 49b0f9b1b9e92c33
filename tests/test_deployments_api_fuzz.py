"""Anything at all, sent to every POST route: never a 500, always an answer, always in the right shape."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import orjson
from fake_gateway import HIDDEN, FakeGateway, Reply, ask
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.deployments.api.app import POST_ROUTES
from pimoe.deployments.api.errors import TABLE
from pimoe.deployments.api.openai_params import CHAT_FIELDS, COMPLETION_FIELDS

PATHS = [path.replace("{name:path}", "echo") for path, _ in POST_ROUTES]

SHORT = st.sampled_from(["name", "role", "content", "type", "data", "shape"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["echo", "hidden_states", "output", "FP32", "BF16", "user", "text"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SHORT, inner, max_size=4),
    max_leaves=8,
)
FIELD = st.sampled_from(
    sorted(CHAT_FIELDS | COMPLETION_FIELDS | {"inputs", "outputs", "parameters", "id", "requests"})
)
NUMBER = st.floats() | st.integers(-(2**63), 2**64 - 1)
TENSOR = st.fixed_dictionaries(
    {"name": st.just("hidden_states"), "datatype": st.sampled_from(["FP32", "FP16", "BF16", "FP64"])},
    optional={
        "shape": st.lists(st.integers(-2, 9) | st.just(HIDDEN), max_size=3),
        "data": st.binary(max_size=80) | st.lists(NUMBER, max_size=9),
        "parameters": JSON,
    },
)
OPERATION = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, min_size=1, max_size=1)},
    optional={
        "parameters": st.dictionaries(
            st.sampled_from(["layer", "priority", "timeout", "cache", "binary_data_output"]), NUMBER | JSON
        ),
        "outputs": JSON,
        "id": JSON,
    },
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *("x-pimoe-priority", "x-pimoe-timeout", "x-pimoe-cache", "x-request-id"),
            *("content-encoding", "content-length", "inference-header-content-length"),
        ]
    ),
    st.sampled_from(["0", "1", "7", "-1", "nan", "true", "", "x" * 300])
    | st.text(st.characters(max_codepoint=255)),
    max_size=2,
)


def check(path: str, reply: Reply) -> None:
    """Answered, completely, and not by a fault; errors in the shape of their path."""
    assert reply.complete
    assert reply.status in {row.status for row in TABLE.values()} | {200}
    assert reply.status != 500, reply.body
    assert reply.headers["x-request-id"]
    if reply.status == 200:
        return
    body = orjson.loads(reply.body)
    openai = path.startswith("/v1") or path.endswith("tokenize")
    code = body["error"]["code"] if openai else body["code"]
    assert TABLE[code].status == reply.status


def send(path: str, body: bytes, headers: dict[str, str]) -> None:
    check(path, asyncio.run(ask(FakeGateway(), "POST", path, body, headers)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PATHS), st.binary(max_size=200), HEADERS, st.booleans())
def test_random_bytes(path: str, body: bytes, headers: dict[str, str], packed: bool) -> None:
    send(path, body, headers | ({"content-type": "application/msgpack"} if packed else {}))


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(PATHS), st.dictionaries(FIELD, JSON, max_size=4), HEADERS)
def test_random_json(path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    send(path, orjson.dumps(body), headers)


@settings(max_examples=250, deadline=None)
@given(st.booleans(), st.dictionaries(FIELD, JSON | NUMBER, max_size=2))
def test_almost_right_generations(chat: bool, extra: dict[str, Any]) -> None:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    body = orjson.dumps({"model": "echo", **prompt, **extra})
    send("/v1/chat/completions" if chat else "/v1/completions", body, {})


@settings(max_examples=250, deadline=None)
@given(st.lists(OPERATION, max_size=3), st.booleans(), st.booleans())
def test_almost_right_tensors(operations: list[dict[str, Any]], many: bool, packed: bool) -> None:
    path = PATHS[3] if many or not operations else PATHS[0]
    value: Any = {"requests": operations} if path == PATHS[3] else operations[0]
    if packed:
        send(path, msgpack.packb(value), {"content-type": "application/msgpack"})
    else:
        send(path, orjson.dumps(value, default=list), {})
