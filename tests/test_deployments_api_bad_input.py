"""Every kind of bad input: a clear error, a stable code, the right shape, and nothing reached the backend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import aiohttp
import ml_dtypes
import msgpack
import numpy as np
import orjson
import pytest
from fake_gateway import HIDDEN, MODEL, VOCAB, FakeGateway, Reply, ask, served
from pimoe.deployments.api import ApiSettings
from pimoe.deployments.api.openai_params import CHAT_NEUTRAL, COMPLETION_NEUTRAL, NEUTRAL

INFER = "/v2/models/echo/infer"
INFER_MANY = "/v2/models/echo/infer_many"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MSGPACK = {"content-type": "application/msgpack"}
USER = [{"role": "user", "content": "hi"}]
SHAPE = [2, HIDDEN]
ZEROS = np.zeros(SHAPE, np.float32)


def error_of(reply: Reply, path: str) -> dict[str, Any]:
    """The error in the shape that the path asks for."""
    assert reply.complete
    body = orjson.loads(reply.body)
    if path.startswith("/v1"):
        assert reply.headers["content-type"] == "application/json"
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        error: dict[str, Any] = body["error"]
        return error
    assert reply.headers["content-type"] == "application/problem+json"
    assert body["status"] == reply.status
    assert body["error"] == body["detail"]
    return {"code": body["code"], "message": body["detail"], "param": body["param"]}


async def refused(
    path: str,
    body: Any,
    code: str,
    status: int = 400,
    headers: dict[str, str] | None = None,
    settings: ApiSettings | None = None,
) -> dict[str, Any]:
    """Sends a body, expects that error, and that no work was started."""
    gateway = FakeGateway(settings=settings or ApiSettings())
    reply = await ask(gateway, "POST", path, body if isinstance(body, bytes) else orjson.dumps(body), headers)
    error = error_of(reply, path)
    assert (reply.status, error["code"]) == (status, code), error
    assert len(error["message"]) < 600
    assert not gateway.generated
    assert not gateway.inferred
    return error


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": "hi", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": USER, **fields}


def tensor(**fields: Any) -> dict[str, Any]:
    """An infer request in msgpack's terms with some fields of its tensor replaced."""
    right = {"name": "hidden_states", "shape": SHAPE, "datatype": "FP32", "data": bytes(64)}
    return {"inputs": [right | fields]}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def called(function: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [CALL | {"function": function}]}


async def refused_tensor(request: Any, code: str = "invalid_tensor") -> dict[str, Any]:
    return await refused(INFER, msgpack.packb(request), code, headers=MSGPACK)


# Bodies


@pytest.mark.parametrize("path", [INFER, INFER_MANY, COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"\x00" * 100,
    ],
)
async def test_malformed_json(path: str, body: bytes) -> None:
    await refused(path, body, "invalid_request")


@pytest.mark.parametrize("path", [INFER, INFER_MANY])
@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"\x81",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\x81\xa1a\xa1\xff",
        b"\x81\x01\x02",
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb({"inputs": msgpack.Timestamp(1)}),
        msgpack.packb({"inputs": [0] * 5000}),
        msgpack.packb({"inputs": "x" * 100_000}),
    ],
)
async def test_malformed_msgpack(path: str, body: bytes) -> None:
    error = await refused(path, body, "invalid_request", headers=MSGPACK)
    assert "not valid msgpack" in error["message"]


@pytest.mark.parametrize("path", [INFER, INFER_MANY])
@pytest.mark.parametrize("value", [[], None, 7, "text", b"bytes", {b"inputs": []}, {b"\xff": 1}])
async def test_msgpack_that_is_no_request(path: str, value: Any) -> None:
    await refused(path, msgpack.packb(value), "invalid_request", headers=MSGPACK)


@pytest.mark.parametrize("path", [INFER, INFER_MANY, COMPLETIONS, CHAT])
async def test_oversize_body_by_its_announced_length(path: str) -> None:
    error = await refused(
        path, b"{}", "payload_too_large", 413, {"content-length": "1001"}, ApiSettings(max_body_bytes=1000)
    )
    assert "1000 bytes" in error["message"]


async def test_oversize_body_while_it_arrives() -> None:
    gateway = FakeGateway(settings=ApiSettings(max_body_bytes=1000))
    parts = [b" " * 400] * 1000
    reply = await ask(gateway, "POST", COMPLETIONS, parts)
    assert (reply.status, error_of(reply, COMPLETIONS)["code"]) == (413, "payload_too_large")


async def test_oversize_json_part() -> None:
    settings = ApiSettings(max_json_bytes=100)
    await refused(COMPLETIONS, completion(prompt="x" * 100), "payload_too_large", 413, settings=settings)
    # Binary tensors are not JSON.
    body = orjson.dumps(tensor(data=None, parameters={"binary_data_size": 64}) | {})
    reply = await ask(
        FakeGateway(settings=ApiSettings(max_json_bytes=len(body))),
        "POST",
        INFER,
        body + bytes(64),
        {"inference-header-content-length": str(len(body))},
    )
    assert reply.status == 200


async def test_oversize_body_over_a_socket() -> None:
    gateway = FakeGateway(settings=ApiSettings(max_body_bytes=10_000))

    async def chunks() -> Any:
        for _ in range(50):
            yield bytes(1000)

    with served(gateway) as address:
        async with aiohttp.ClientSession(f"http://{address}") as session:
            for data in (bytes(10_001), chunks()):
                async with session.post(INFER, data=data) as response:
                    assert response.status == 413
                    assert (await response.json(content_type=None))["code"] == "payload_too_large"
            async with session.get("/health") as response:
                assert response.status == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP, identity"])
@pytest.mark.parametrize("path", [INFER, COMPLETIONS])
async def test_compressed_bodies(path: str, encoding: str) -> None:
    await refused(path, b"x", "unsupported_media_type", 415, {"content-encoding": encoding})


# Paths


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "/v2/models", 404, "not_found"),
        ("GET", "/v2/models/echo/config", 404, "model_not_found"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("PUT", INFER, 405, "method_not_allowed"),
        ("GET", INFER, 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/echo", 405, "method_not_allowed"),
    ],
)
async def test_unknown_paths_and_methods(method: str, path: str, status: int, code: str) -> None:
    reply = await ask(FakeGateway(), method, path)
    assert (reply.status, error_of(reply, path)["code"]) == (status, code)
    assert reply.headers["x-request-id"]
    if status == 405:
        assert reply.headers["allow"]


@pytest.mark.parametrize("path", ["/v2/models/other/infer", "/v2/models/other/infer_many"])
async def test_unknown_model_in_the_path(path: str) -> None:
    await refused(path, {}, "model_not_found", 404)


@pytest.mark.parametrize("body", [completion(), chat()])
async def test_unknown_model_in_the_body(body: dict[str, Any]) -> None:
    path = COMPLETIONS if "prompt" in body else CHAT
    assert (await refused(path, body | {"model": "gpt-9"}, "model_not_found", 404))["param"] == "model"
    for wrong in (None, 7, ["echo"]):
        assert (await refused(path, body | {"model": wrong}, "invalid_request"))["param"] == "model"


# Tensors


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ([2, HIDDEN + 1], "hidden size is 9; 'echo' has 8"),
        ([0, HIDDEN], "at least one"),
        ([-2, HIDDEN], "at least one"),
        ([2, -HIDDEN], "hidden size is -8"),
        ([2**40, HIDDEN], "64 bytes of data"),
        ([2**62, HIDDEN], "more than any machine has"),
        ([HIDDEN], "must be [tokens, 8]"),
        ([1, 2, HIDDEN], "must be [tokens, 8]"),
        ([2.0, HIDDEN], "must be [tokens, 8]"),
        ([True, HIDDEN], "must be [tokens, 8]"),
        (["2", HIDDEN], "must be [tokens, 8]"),
        ([], "must be [tokens, 8]"),
        ("2,8", "must be [tokens, 8]"),
        (None, "must be [tokens, 8]"),
        ([3, HIDDEN], "64 bytes of data; shape [3, 8] of float32 takes 96"),
    ],
)
async def test_wrong_shape(shape: Any, says: str) -> None:
    assert says in (await refused_tensor(tensor(shape=shape)))["message"]


@pytest.mark.parametrize("datatype", ["INT32", "fp32", "", None, 4, ["FP32"], "BYTES"])
async def test_wrong_datatype(datatype: Any) -> None:
    assert "FP32, FP16, BF16, FP64" in (await refused_tensor(tensor(datatype=datatype)))["message"]


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
async def test_wrong_byte_length(length: int) -> None:
    assert f"{length} bytes" in (await refused_tensor(tensor(data=bytes(length))))["message"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("datatype", ["FP32", "FP16", "FP64", "BF16"])
async def test_nan_and_inf(datatype: str, value: float) -> None:
    dtype: Any = {"FP32": "f4", "FP16": "f2", "FP64": "f8", "BF16": ml_dtypes.bfloat16}[datatype]
    array = np.zeros(SHAPE, dtype)
    array[1, 3] = value
    error = await refused_tensor(tensor(datatype=datatype, data=array.tobytes()))
    assert "NaN or Inf" in error["message"]


@pytest.mark.parametrize("data", [None, [0.0] * 16, "x" * 64, 5])
async def test_msgpack_data_must_be_bytes(data: Any) -> None:
    assert "must be bin" in (await refused_tensor(tensor(data=data)))["message"]


@pytest.mark.parametrize(
    ("datatype", "data", "says"),
    [
        ("FP32", [0.0] * 15, "15 numbers"),
        ("FP32", [[0.0] * 8] * 3, "24 numbers"),
        ("FP32", [[0.0] * 8, [0.0] * 7], "rows of other lengths"),
        ("FP32", [[0.0] * 8, 0.0], "rows of other lengths"),
        ("FP32", [0.0] * 15 + ["1"], "not a number"),
        ("FP32", [0.0] * 15 + [None], "not a number"),
        ("FP32", [0.0] * 15 + [True], "not a number"),
        ("FP32", [0.0] * 15 + [[]], "not a number"),
        ("FP32", [0.0] * 15 + [1e39], "beyond the range of float32"),
        ("FP16", [0.0] * 15 + [70_000], "beyond the range of float16"),
        ("BF16", [0.0] * 15 + [-3.4e38], "beyond the range of bfloat16"),
        ("FP32", {"a": 1}, "list of numbers"),
        ("FP32", None, "list of numbers"),
        ("FP32", [], "0 numbers"),
    ],
)
async def test_wrong_json_numbers(datatype: str, data: Any, says: str) -> None:
    error = await refused(INFER, tensor(datatype=datatype, data=data), "invalid_tensor")
    assert says in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": [{}, {}]}, "inputs"),
        ({"inputs": ["x"]}, "inputs[0]"),
        ({"inputs": {"name": "hidden_states"}}, "inputs"),
        ({"input": []}, "input"),
        ({"id": 7}, "id"),
        ({"id": "x" * 1000}, "id"),
        ({"outputs": [{"name": "logits"}]}, "outputs[0].name"),
        ({"outputs": [{"name": "output"}] * 2}, "outputs"),
        (
            {"outputs": [{"name": "output", "parameters": {"classification": 2}}]},
            "outputs[0].parameters.classification",
        ),
        ({"parameters": 5}, "parameters"),
        ({"parameters": {"layer": 1}}, "parameters.layer"),
        ({"parameters": {"layer": -1}}, "parameters.layer"),
        ({"parameters": {"layer": "0"}}, "parameters.layer"),
        ({"parameters": {"layers": 1}}, "parameters.layers"),
        ({"parameters": {"binary_data_output": 1}}, "parameters.binary_data_output"),
    ],
)
async def test_wrong_infer_fields(change: dict[str, Any], param: str) -> None:
    error = await refused_tensor(tensor() | change, "invalid_request")
    assert error["param"] == param
    assert param in error["message"]


async def test_wrong_input_name() -> None:
    assert (await refused_tensor(tensor(name="input_0")))["param"] == "inputs[0].name"
    assert (await refused_tensor(tensor(extra=1), "invalid_request"))["param"] == "inputs[0].extra"
    shared = tensor(parameters={"shared_memory_region": "r"})
    assert "shared_memory_region" in (await refused_tensor(shared, "invalid_request"))["message"]


@pytest.mark.parametrize(
    ("size", "length", "tail", "says"),
    [
        (64, None, 64, "not valid JSON"),
        (64, "0", 63, "a row of float32 takes 32"),
        (64, "99999", 64, "at most the body's"),
        (64, "-1", 64, "at most the body's"),
        (64, "1e3", 64, "at most the body's"),
        (64, "9" * 40, 64, "at most the body's"),
        (63, "right", 64, "binary_data_size is 63, but 64 bytes"),
        (64, "right", 65, "binary_data_size is 64, but 65 bytes"),
        (64, "right", 0, "binary_data_size is 64, but 0 bytes"),
        (-1, "right", 64, "binary_data_size"),
        (None, "right", 64, "no binary_data_size"),
        (96, "right", 96, "96 bytes of data"),
    ],
)
async def test_wrong_binary_parts(size: int | None, length: str | None, tail: int, says: str) -> None:
    request = tensor(parameters={"binary_data_size": size})
    del request["inputs"][0]["data"]
    head = orjson.dumps(request)
    length = str(len(head)) if length == "right" else length
    headers = {} if length is None else {"inference-header-content-length": length}
    reply = await ask(FakeGateway(), "POST", INFER, head + bytes(tail), headers)
    assert reply.status == 400
    assert says in error_of(reply, INFER)["message"]


async def test_binary_size_without_its_header() -> None:
    request = tensor(parameters={"binary_data_size": 64})
    del request["inputs"][0]["data"]
    assert "Inference-Header-Content-Length" in (await refused(INFER, request, "invalid_tensor"))["message"]


@pytest.mark.parametrize("requests", [None, [], [{}] * 5, "x", {"a": 1}])
async def test_wrong_number_of_operations(requests: Any) -> None:
    settings = ApiSettings(max_infer_many=4)
    body = msgpack.packb({"requests": requests})
    error = await refused(INFER_MANY, body, "invalid_request", headers=MSGPACK, settings=settings)
    assert error["param"] == "requests"


# Priority, timeout, cache


def in_json(value: Any) -> bool:
    """Whether JSON has that value: it has no NaN and no Infinity."""
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("priority", [-0.1, 1.1, 2, True, "high", [], math.nan, math.inf, 2**63])
async def test_wrong_priority(priority: Any) -> None:
    request = tensor() | {"parameters": {"priority": priority}}
    assert (await refused_tensor(request, "invalid_request"))["param"] == "parameters.priority"
    if in_json(priority):
        error = await refused(COMPLETIONS, completion(priority=priority), "invalid_request")
        assert error["param"] == "priority"


@pytest.mark.parametrize("seconds", [0, -1, 0.0, -0.5, 3600.5, 1e12, True, "5", math.nan, math.inf])
async def test_wrong_timeout(seconds: Any) -> None:
    request = tensor() | {"parameters": {"timeout": seconds}}
    assert (await refused_tensor(request, "invalid_request"))["param"] == "parameters.timeout"
    if in_json(seconds):
        assert (await refused(CHAT, chat(timeout=seconds), "invalid_request"))["param"] == "timeout"


@pytest.mark.parametrize("value", [3601, 99_999, 3_600_000_001, 2**62])
async def test_an_integer_timeout_that_is_neither_seconds_nor_microseconds(value: int) -> None:
    error = await refused_tensor(tensor() | {"parameters": {"timeout": value}}, "invalid_request")
    assert "microseconds" in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", "2"),
        ("priority", "nan"),
        ("priority", "urgent"),
        ("priority", ""),
        ("timeout", "0"),
        ("timeout", "-1"),
        ("timeout", "1e9"),
        ("timeout", "1_0"),
        ("timeout", "inf"),
        ("cache", "maybe"),
        ("cache", "\xff"),
    ],
)
async def test_wrong_option_headers(name: str, value: str) -> None:
    header = f"x-pimoe-{name}"
    error = await refused(COMPLETIONS, completion(), "invalid_request", headers={header: value})
    assert error["param"] == header
    await refused(INFER, msgpack.packb(tensor()), "invalid_request", headers={header: value, **MSGPACK})


@pytest.mark.parametrize("cache", [1, "true", [], 0.5])
async def test_wrong_cache(cache: Any) -> None:
    assert (await refused(COMPLETIONS, completion(cache=cache), "invalid_request"))["param"] == "cache"


# OpenAI


@pytest.mark.parametrize(
    "prompt",
    [
        *("", None, {"a": 1}, 5),
        *([], [[]], ["", "a"], [[1], []], [None], ["a"] * 129),
        *([1, "a"], [1, -1], [VOCAB], [2**64 - 1], [1.5], [1e30], [True], ["a", [1]], [["a"]]),
    ],
)
async def test_wrong_prompt(prompt: Any) -> None:
    assert (await refused(COMPLETIONS, completion(prompt=prompt), "invalid_request"))["param"] == "prompt"


async def test_token_out_of_vocabulary_is_named() -> None:
    error = await refused(COMPLETIONS, completion(prompt=[1, 258]), "invalid_request")
    assert "258" in error["message"]
    assert "0 to 257" in error["message"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "x" * 400}, "401 prompt tokens exceed the context of 400"),
        ({"prompt": "x" * 399}, "400 prompt tokens exceed the context of 400"),
        (
            {"prompt": [1] * 10, "max_tokens": 391},
            "10 prompt tokens and max_tokens 391 exceed the context of 400",
        ),
        ({"prompt": "x" * 200_000}, "200000 characters"),
        ({"max_tokens": 2**60}, "exceed the context of 400"),
    ],
)
async def test_over_the_context(fields: dict[str, Any], says: str) -> None:
    assert says in (await refused(COMPLETIONS, completion(**fields), "context_length_exceeded"))["message"]


async def test_chat_over_the_context() -> None:
    await refused(CHAT, chat(max_completion_tokens=400), "context_length_exceeded")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1, 1.5, "5", True, 2**63]),
        ("min_tokens", [-1, 17, "2"]),
        ("temperature", [-0.1, 2.1, "0", True, []]),
        ("top_p", [0, -0.1, 1.1]),
        ("top_k", [-2, 1.5]),
        ("min_p", [-0.1, 1.1]),
        ("seed", [1.5, "1", 2**63, 2.0**53, -(2.0**53), 1e300, "1.0", False]),
        ("n", [0, 9, -1, 9.0, 1.5, True]),
        ("stop", ["", [""], ["a"] * 17, [1], 5, {"a": 1}, "x" * 257]),
        ("stop_token_ids", [[-1], [VOCAB], ["a"], 5, [True], [1] * 65]),
        ("logprobs", [-1, 21, True, "1"]),
        ("stream", [1, "true"]),
        ("ignore_eos", [1, "true"]),
        ("return_token_ids", [1]),
        ("presence_penalty", [-2.1, 2.1, "1"]),
        ("frequency_penalty", [-2.1, 2.1, True]),
        ("repetition_penalty", [0, -1, 10.1, "1"]),
        ("logit_bias", [[], 5, {"a": 1}, {"5": 101}, {"5": "1"}, {"5": None}, {str(VOCAB): 1}, {"-1": 1}]),
        (
            "logit_bias",
            [{"²": 1}, {"5.0": 1}, {"5": True}, {"9" * 30: 1}, dict.fromkeys(map(str, range(1025)), 1)],
        ),
        ("prompt_logprobs", [-1, 21, True, "1"]),
        ("best_of", [2, 0, "1"]),
        ("echo", [1, "true"]),
        ("cache_salt", ["", "x" * 257, 5]),
        ("truncate_prompt_tokens", [0, -2, 1.5, "3"]),
        ("add_special_tokens", [1]),
        ("skip_special_tokens", [1]),
        ("include_stop_str_in_output", ["no"]),
        ("return_tokens_as_token_ids", [1]),
        ("stream_options", [{"include_usage": True}, [], 5]),
    ],
)
async def test_wrong_values(name: str, values: list[Any]) -> None:
    for value in values:
        error = await refused(COMPLETIONS, completion(**{name: value}), "invalid_request")
        assert error["param"] == name, value


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"include_usage": 1}, "stream_options.include_usage"),
        ({"continuous": True}, "stream_options.continuous"),
        ({"include_usage": True, "continuous_usage_stats": 1}, "stream_options.continuous_usage_stats"),
        (5, "stream_options"),
    ],
)
async def test_wrong_stream_options(options: Any, param: str) -> None:
    error = await refused(COMPLETIONS, completion(stream=True, stream_options=options), "invalid_request")
    assert error["param"] == param


UNSUPPORTED: dict[str, Any] = {
    "allowed_token_ids": [5],
    "bad_words": ["x"],
    "suffix": "end",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "early_stopping": True,
    "length_penalty": 0.5,
    "logits_processors": ["x"],
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "spaces_between_special_tokens": False,
    "use_beam_search": True,
    "verbosity": "low",
    "web_search_options": {},
    "moderation": {"model": "m"},
    # of completions
    "parallel_tool_calls": 1.5,
    "reasoning_effort": "high",
    "tool_choice": "required",
    "tools": [{"type": "function"}],
    # of chats
    "chat_template": "{{ messages }}",
    "documents": [{"title": "t", "text": "x"}],
    "echo": True,
}
BOTH = [(COMPLETIONS, completion(), NEUTRAL | COMPLETION_NEUTRAL), (CHAT, chat(), NEUTRAL | CHAT_NEUTRAL)]


@pytest.mark.parametrize(("path", "body", "neutral"), BOTH, ids=["completion", "chat"])
async def test_what_would_change_the_answer_is_refused(
    path: str, body: dict[str, Any], neutral: dict[str, tuple[Any, ...]]
) -> None:
    for name in neutral:
        error = await refused(path, body | {name: UNSUPPORTED[name]}, "invalid_request")
        assert error["param"] == name
        assert "not supported" in error["message"]


@pytest.mark.parametrize(("path", "body", "neutral"), BOTH, ids=["completion", "chat"])
async def test_what_changes_nothing_is_accepted(
    path: str, body: dict[str, Any], neutral: dict[str, tuple[Any, ...]]
) -> None:
    harmless = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prediction": None,
        "request_id": "mine",
    }
    for extra in (
        {name: values[0] for name, values in neutral.items() if values} | {"best_of": 1},
        harmless,
        dict.fromkeys(neutral),
        {"seed": -5, "top_k": -1, "min_tokens": None, "logit_bias": {}, "response_format": {"type": "text"}},
    ):
        reply = await ask(FakeGateway(), "POST", path, orjson.dumps(body | extra))
        assert reply.status == 200, reply.body


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, completion(max_token=5), "max_token"),
        (COMPLETIONS, completion(messages=USER), "messages"),
        (COMPLETIONS, completion(top_logprobs=1), "top_logprobs"),
        (CHAT, chat(prompt="x"), "prompt"),
        (CHAT, chat(**{"x" * 5000: 1}), "x" * 100),
    ],
)
async def test_unknown_fields(path: str, body: dict[str, Any], param: str) -> None:
    assert (await refused(path, body, "invalid_request"))["param"] == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "hi"}], "messages[0].role"),
        ([*USER, {"role": "function", "content": "x"}], "messages[1].role"),
        ([*USER, {"role": "user", "content": "x", "tool_call_id": "c"}], "messages[1].tool_call_id"),
        ([*USER, {"role": "tool", "content": "x", "tool_call_id": 1}], "messages[1].tool_call_id"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": "x", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": ["x"]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [CALL | {"id": 5}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}], "messages[0].tool_calls[0].type"),
        ([called({"arguments": "{}"})], "messages[0].tool_calls[0].function.name"),
        ([called({"name": "f", "arguments": "{"})], "messages[0].tool_calls[0].function.arguments"),
        ([called({"name": "f", "arguments": "[1]"})], "messages[0].tool_calls[0].function.arguments"),
        ([called({"name": "f", "arguments": 5})], "messages[0].tool_calls[0].function.arguments"),
        ([called({"name": "f", "x": 1})], "messages[0].tool_calls[0].function.x"),
        ([{"role": "user", "content": "x", "weight": 1}], "messages[0].weight"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
    ],
)
async def test_wrong_messages(messages: Any, param: str) -> None:
    assert (await refused(CHAT, chat(messages=messages), "invalid_request"))["param"] == param


async def test_chat_logprobs_go_together() -> None:
    assert (await refused(CHAT, chat(top_logprobs=2), "invalid_request"))["param"] == "top_logprobs"
    assert (await refused(CHAT, chat(logprobs=2), "invalid_request"))["param"] == "logprobs"
    both = chat(max_tokens=5, max_completion_tokens=6)
    assert (await refused(CHAT, both, "invalid_request"))["param"] == "max_tokens"


async def test_a_layer_model_generates_no_text() -> None:
    gateway = FakeGateway(info=replace(MODEL, kind="layer", max_context_tokens=0))
    reply = await ask(gateway, "POST", COMPLETIONS, orjson.dumps(completion()))
    assert error_of(reply, COMPLETIONS)["param"] == "model"
    assert reply.status == 400
