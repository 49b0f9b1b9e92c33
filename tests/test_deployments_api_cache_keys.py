"""From bodies to cache keys: one question in many spellings has one key, and two questions have two."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from fake_gateway import HIDDEN, MODEL, FakeGateway, ask
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.deployments.api import ApiSettings
from pimoe.deployments.api.fields import Fields
from pimoe.deployments.api.generation import make_plan
from pimoe.deployments.api.inference_codec import Reader, split_body
from pimoe.deployments.api.openai_params import NEUTRAL, read_chat, read_completion
from pimoe.deployments.api.options import from_headers
from pimoe.runtime.caching import generate_key, infer_key

SETTINGS = ApiSettings()

# Each with its default, and values that ask for something else.
DEFAULTS: dict[str, tuple[Any, list[Any]]] = {
    "temperature": (1.0, [0.0, 0.5, 2.0]),
    "top_p": (1.0, [0.5]),
    "top_k": (0, [1, 40]),
    "min_p": (0.0, [0.25, 1.0]),
    "min_tokens": (0, [1, 2]),
    "max_tokens": (16, [3, 17]),
    "logprobs": (None, [0, 2]),
    "ignore_eos": (False, [True]),
    "stop_token_ids": ([], [[3], [3, 5]]),
    "stop": ([], [["x"], ["x", "yz"]]),
    "presence_penalty": (0.0, [-1.0, 0.5]),
    "frequency_penalty": (0.0, [2.0]),
    "repetition_penalty": (1.0, [1.5]),
    "logit_bias": ({}, [{"3": 1.0}, {"3": 1.0, "11": -100.0}]),
    "prompt_logprobs": (None, [0, 2]),
    "cache_salt": (None, ["mine", "yours"]),
    "response_format": (None, [{"type": "json_object"}]),
}
# What is asked for in other words, or does not matter to the answer.
BESIDE: dict[str, list[Any]] = {
    "user": ["someone"],
    "priority": [0.0, 0.5, 1],
    "timeout": [5, 30.0],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False, True],
    "add_special_tokens": [False, True],
    "store": [True],
    **{name: [None, *values] for name, values in NEUTRAL.items()},
}


@st.composite
def questions(draw: st.DrawFn) -> dict[str, Any]:
    """The fields that decide a completion, all of them given."""
    wanted = {name: draw(st.sampled_from([default, *others])) for name, (default, others) in DEFAULTS.items()}
    return {"model": MODEL.name, "prompt": [1, 2, 3], "seed": draw(st.sampled_from([0, 7])), **wanted}


@st.composite
def spelled(draw: st.DrawFn, question: dict[str, Any]) -> bytes:
    """The question as some client would write it."""
    body: dict[str, Any] = {}
    for name, value in question.items():
        if name in DEFAULTS and value == DEFAULTS[name][0] and draw(st.booleans()):
            if draw(st.booleans()):
                body[name] = None
            continue
        whole = isinstance(value, float) and value.is_integer()
        body[name] = int(value) if whole and draw(st.booleans()) else value
    for name in ("stop_token_ids", "stop"):
        if body.get(name):
            body[name] = draw(st.permutations(body[name]))
    if body.get("logit_bias"):
        body["logit_bias"] = dict(draw(st.permutations([*body["logit_bias"].items(), ("7", 0)])))
    for name in draw(st.lists(st.sampled_from(sorted(BESIDE)), max_size=4, unique=True)):
        body[name] = draw(st.sampled_from(BESIDE[name])) if BESIDE[name] else None
    return orjson.dumps(dict(draw(st.permutations(list(body.items())))))


def completion_key(body: bytes, headers: dict[bytes, bytes] | None = None) -> bytes:
    """As the gateway gets to it."""
    fields = Fields(orjson.loads(body))
    wanted = read_completion(fields, MODEL, SETTINGS, from_headers(headers or {}, SETTINGS))
    plan = make_plan(wanted, [fields.values["prompt"]], MODEL, "work", 5.0)
    assert plan.bypass is None
    return generate_key(MODEL, plan.requests[0])


@settings(deadline=None)
@given(st.data())
def test_one_completion_in_any_spelling_has_one_key(data: st.DataObject) -> None:
    question = data.draw(questions())
    bodies = [data.draw(spelled(question)) for _ in range(2)]
    assert completion_key(bodies[0]) == completion_key(bodies[1])


@settings(deadline=None)
@given(st.data())
def test_two_completions_have_two_keys(data: st.DataObject) -> None:
    first, second = data.draw(questions()), data.draw(questions())
    if data.draw(st.integers(0, 5)):  # differ in one field at most
        name = data.draw(st.sampled_from(sorted({*DEFAULTS, "seed"})))
        second = {**first, name: second[name]}
    greedy = first["temperature"] == second["temperature"] == 0
    same = all(first[name] == second[name] for name in first if not (greedy and name == "seed"))
    keys = [completion_key(data.draw(spelled(question))) for question in (first, second)]
    assert (keys[0] == keys[1]) == same


def test_headers_and_body_are_one_question_but_for_the_tenant() -> None:
    body = orjson.dumps({"model": MODEL.name, "prompt": [1], "seed": 1})
    plain = completion_key(body)
    assert completion_key(body, {b"x-pimoe-priority": b"1", b"x-pimoe-timeout": b"3"}) == plain
    tenants = {completion_key(body, {b"x-pimoe-tenant": tenant}) for tenant in (b"a", b"b", b"A")}
    assert len(tenants | {plain}) == 4


def test_a_chat_asks_what_a_completion_with_its_prompt_asks() -> None:
    chat = Fields({"model": MODEL.name, "messages": [], "max_completion_tokens": 16, "seed": 1})
    wanted = read_chat(chat, MODEL, SETTINGS, from_headers({}, SETTINGS))
    (request,) = make_plan(wanted, [[1, 2, 3]], MODEL, "work", 5.0).requests
    body = orjson.dumps({"model": MODEL.name, "prompt": [1, 2, 3], "seed": 1})
    assert generate_key(MODEL, request) == completion_key(body)


# Tensors


def tensor_keys(values: list[float], datatype: str, options: dict[str, Any]) -> set[bytes]:
    """The keys of one tensor request: as numbers in JSON, as bytes after it, and in msgpack."""
    array = np.array(values, {"FP32": np.float32, "FP64": np.float64}[datatype])
    tensor = {"name": "hidden_states", "shape": [len(values) // HIDDEN, HIDDEN], "datatype": datatype}
    numbers = [
        int(value) if float(value).is_integer() and math.copysign(1, value) > 0 else value for value in values
    ]
    reader = Reader(MODEL, SETTINGS, from_headers({}, SETTINGS), "json")
    calls = [
        reader.read(orjson.loads(orjson.dumps({"inputs": [{**tensor, "data": each}], **options})))
        for each in (array.tolist(), numbers, [numbers[i : i + HIDDEN] for i in range(0, len(numbers), HIDDEN)])
    ]
    head = orjson.dumps({**options, "inputs": [{**tensor, "parameters": {"binary_data_size": array.nbytes}}]})
    text, binary = split_body(head + array.tobytes(), str(len(head)).encode())
    calls.append(reader.read(orjson.loads(text), binary))
    packed = msgpack.packb({"inputs": [{"data": array.tobytes(), **tensor}], **options})
    calls.append(Reader(MODEL, SETTINGS, from_headers({}, SETTINGS), "msgpack").read(msgpack.unpackb(packed)))
    return {infer_key(MODEL, call.request("id", 1.0)) for call in calls}


values = st.lists(st.sampled_from([0.0, 1.0, -2.5, 3.0]), min_size=HIDDEN, max_size=HIDDEN) | st.lists(
    st.floats(-8, 8, width=32), min_size=2 * HIDDEN, max_size=2 * HIDDEN
)


@settings(deadline=None)
@given(values, st.sampled_from(["FP32", "FP64"]))
def test_one_tensor_in_any_encoding_has_one_key(numbers: list[float], datatype: str) -> None:
    explicit = tensor_keys(numbers, datatype, {"parameters": {"layer": 0, "priority": 1}, "id": "x"})
    assert len(explicit | tensor_keys(numbers, datatype, {})) == 1


@settings(deadline=None)
@given(values, values, st.sampled_from([0, 2]))
def test_two_tensors_have_two_keys(first: list[float], second: list[float], layer: int) -> None:
    same = np.array(first).tobytes() == np.array(second).tobytes() and layer == 0
    keys = tensor_keys(first, "FP32", {}) | tensor_keys(second, "FP32", {"parameters": {"layer": layer}})
    assert len(keys) == 2 - same
    assert not keys & tensor_keys(first, "FP64", {})


# The tenant's way


@pytest.mark.parametrize("tenant", ["", "acme", "a" * 128, "~!tenant/1"])
async def test_the_tenant_comes_from_its_header(tenant: str) -> None:
    gateway = FakeGateway()
    headers = {"x-pimoe-tenant": tenant} if tenant else {}
    body = {"model": "echo", "prompt": "x", "n": 2, "max_tokens": 1}
    for path, content in (
        ("/v1/completions", body),
        ("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": "x"}]}),
    ):
        reply = await ask(gateway, "POST", path, orjson.dumps(content), headers)
        assert reply.status == 200, reply.body
    states = np.zeros((1, HIDDEN), np.float32)
    tensor = {"name": "hidden_states", "shape": [1, HIDDEN], "datatype": "FP32", "data": states.tolist()}
    for path, infer in (("infer", {"inputs": [tensor]}), ("infer_many", {"requests": [{"inputs": [tensor]}] * 2})):
        reply = await ask(gateway, "POST", f"/v2/models/echo/{path}", orjson.dumps(infer), headers)
        assert reply.status == 200, reply.body
    requests = [*gateway.generated, *gateway.inferred]
    assert len(requests) == 6
    assert {request.tenant for request in requests} == {tenant}


@pytest.mark.parametrize("tenant", ["a b", "a" * 129, "t\u00e9", "a\tb", "a\x7f"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v2/models/echo/infer"])
async def test_another_kind_of_tenant_is_refused(tenant: str, path: str) -> None:
    gateway = FakeGateway()
    body = orjson.dumps({"model": "echo", "prompt": "x"} if path.startswith("/v1") else {"inputs": []})
    reply = await ask(gateway, "POST", path, body, {"x-pimoe-tenant": tenant})
    error = orjson.loads(reply.body)
    error = error["error"] if path.startswith("/v1") else error
    assert (reply.status, error["code"], error["param"]) == (400, "invalid_request", "x-pimoe-tenant")
    assert not gateway.generated


async def test_a_body_cannot_name_a_tenant() -> None:
    reply = await ask(FakeGateway(), "POST", "/v1/completions", orjson.dumps({"model": "echo", "tenant": "x"}))
    assert reply.status == 400


async def test_why_the_cache_is_left_alone_is_told() -> None:
    gateway = FakeGateway()
    for fields in ({}, {"seed": 1}, {"seed": 1, "cache": False}, {"cache": False}, {"temperature": 0}):
        body = orjson.dumps({"model": "echo", "prompt": "x", **fields})
        await ask(gateway, "POST", "/v1/completions", body)
    assert gateway.bypasses == ["nondeterministic", None, "asked", "asked", None]
