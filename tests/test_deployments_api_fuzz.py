"""Anything at all, sent to every POST route: never a 500, always an answer, always in the right shape."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import orjson
import pytest
from fake_gateway import HIDDEN, FakeGateway, Reply, ask
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.deployments.api.app import POST_ROUTES
from pimoe.deployments.api.errors import TABLE
from pimoe.deployments.api.openai_params import CHAT_FIELDS, COMPLETION_FIELDS
from scripted_chat import MARKS, ScriptedGateway

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


# Chats with tools, and models that answer anything at all

WORDS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            '{"name"',
            ": ",
            '"f"',
            "}",
            "{",
            "]",
            "[",
            "é",
        ),
        *(', "arguments": ', ', "parameters": ', "\n", " ", ";", "<", "x", "\\", '"', "<|python_tag|>", "null"),
        *(
            "<|channel|>",
            "final",
            "analysis",
            " to=functions.f",
            "<|message|>",
            "<|end|>",
            "<|start|>",
            "<|call|>",
        ),
        *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        *(
            "function",
            "<function=f>",
            "<parameter=k>",
            "</parameter>",
            "</function>",
            '{"name": "f", "arguments": {}}',
        ),
    ]
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function")},
    optional={"function": st.dictionaries(st.sampled_from(["name", "parameters", "strict", "description"]), JSON)},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"])},
    optional={
        "content": st.text(max_size=5) | JSON,
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"id": st.text(max_size=3) | JSON},
                optional={
                    "function": st.dictionaries(st.sampled_from(["name", "arguments"]), st.just("{}") | JSON)
                },
            ),
            max_size=2,
        ),
        "tool_call_id": st.text(max_size=3) | JSON,
        "reasoning_content": st.text(max_size=3) | JSON,
    },
)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ScriptedGateway]:
    return {name: ScriptedGateway(tmp_path_factory.mktemp("checkpoint"), name) for name in MARKS}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(MARKS)), st.lists(MESSAGE, max_size=3), st.lists(TOOL | JSON, max_size=2), JSON)
def test_random_tools(
    scripted: dict[str, ScriptedGateway], name: str, messages: list[Any], tools: list[Any], choice: Any
) -> None:
    body = {"model": "echo", "messages": messages, "tools": tools, "tool_choice": choice}
    check(
        "/v1/chat/completions",
        asyncio.run(ask(scripted[name], "POST", "/v1/chat/completions", orjson.dumps(body))),
    )


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(set(MARKS) - {"unknown"})),
    st.lists(WORDS, max_size=10),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([[], ["x"], [" ", "}"]]),
    st.integers(1, 60),
)
def test_a_streamed_answer_adds_up_to_the_whole_one(
    scripted: dict[str, ScriptedGateway],
    name: str,
    words: list[str],
    size: int,
    parallel: bool,
    stop: list[str],
    max_tokens: int,
) -> None:
    gateway = scripted[name]
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "tools": tools, "temperature": 0}
    body |= {"parallel_tool_calls": parallel, "stop": stop, "max_tokens": max_tokens}

    async def both() -> tuple[Reply, Reply]:
        gateway.script("".join(words), size=size)
        whole = await ask(gateway, "POST", "/v1/chat/completions", orjson.dumps(body))
        return whole, await ask(gateway, "POST", "/v1/chat/completions", orjson.dumps(body | {"stream": True}))

    whole, streamed = asyncio.run(both())
    (choice,) = orjson.loads(whole.body)["choices"]
    message: dict[str, Any] = {"role": None, "content": None, "reasoning_content": None, "tool_calls": []}
    *events, _done, _end = streamed.body.split(b"\n\n")
    for event in events:
        (part,) = orjson.loads(event.removeprefix(b"data: "))["choices"]
        for key, value in part["delta"].items():
            if key == "tool_calls":
                for call in value:
                    if call.pop("index") == len(message[key]):
                        message[key].append(call)
                    else:
                        message[key][-1]["function"]["arguments"] += call["function"]["arguments"]
            elif value is not None:
                message[key] = (message[key] or "") + value
    assert message["role"] == "assistant"
    assert (message["content"] or "") == (choice["message"]["content"] or "")
    assert message["reasoning_content"] == choice["message"].get("reasoning_content")
    assert message["tool_calls"] == choice["message"].get("tool_calls", [])
    assert (part["finish_reason"], part["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])


# Tensors


@settings(max_examples=250, deadline=None)
@given(st.lists(OPERATION, max_size=3), st.booleans(), st.booleans())
def test_almost_right_tensors(operations: list[dict[str, Any]], many: bool, packed: bool) -> None:
    path = PATHS[3] if many or not operations else PATHS[0]
    value: Any = {"requests": operations} if path == PATHS[3] else operations[0]
    if packed:
        send(path, msgpack.packb(value), {"content-type": "application/msgpack"})
    else:
        send(path, orjson.dumps(value, default=list), {})
