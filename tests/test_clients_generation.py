"""What a generation is asked with, and what is read out of its answer: every field, whole and streamed."""

from __future__ import annotations

import json
from collections import UserDict
from typing import Any

import pytest
from pimoe.clients import (
    AppliedMode,
    AsyncClient,
    GenerateOptions,
    Generation,
    GenerationChunk,
    InvalidRequestError,
    ProtocolError,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from scripted_transport import Reply, ScriptedTransport, completion, json_reply, sse

MESSAGES = [{"role": "user", "content": "weather?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
EVERY: GenerateOptions = {
    "mode": "ultra",
    "truncation": "disabled",
    "max_tokens": 5,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "seed": 7,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "logit_bias": {5: -100.0},
    "stop": ("x", "y"),
    "stop_token_ids": range(2),
    "ignore_eos": True,
    "response_format": SCHEMA,
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "chat_template_kwargs": {"enable_thinking": False},
    "logprobs": 2,
    "prompt_logprobs": 1,
    "return_token_ids": False,
    "priority": "batch",
    "timeout_s": 9.0,
    "cache": False,
    "cache_salt": "me",
    "extra_body": {"user": "u"},
}
CHAT_ONLY = {"tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "truncation"}


def message(**more: Any) -> dict[str, Any]:
    """A whole chat completion."""
    said = {"role": "assistant", "content": None, **more}
    choice = {"index": 0, "message": said, "finish_reason": "tool_calls", "logprobs": None}
    return {"id": "c", "model": "m", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


def event(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """One event of a streamed chat completion."""
    return {"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def call_part(index: int, **more: Any) -> dict[str, Any]:
    """One piece of a streamed tool call."""
    given = {name: more.pop(name) for name in ("id", "type") if name in more}
    return {"index": index, **given, "function": more}


async def answer_to(reply: Reply, chat: bool = True, **options: Any) -> tuple[Generation, dict[str, Any]]:
    transport = ScriptedTransport(reply)
    async with AsyncClient(transport=transport, model="m") as client:
        found = await (client.chat(MESSAGES, **options) if chat else client.generate("x", **options))
    return found, transport.body()


async def streamed(*events: dict[str, Any]) -> tuple[Generation, list[GenerationChunk]]:
    transport = ScriptedTransport(Reply(200, {}, [sse(*events)]))
    async with AsyncClient(transport=transport, model="m") as client, client.stream(MESSAGES) as stream:
        chunks = [chunk async for chunk in stream]
        return stream.generation, chunks


# What is sent ----------------------------------------------------------------------------------------------------


def test_every_option_is_tried_here() -> None:
    assert EVERY.keys() == GenerateOptions.__annotations__.keys()


async def test_every_option_of_a_chat() -> None:
    _, body = await answer_to(json_reply(message()), **EVERY)
    assert 0 < body.pop("timeout") <= 9
    expected: dict[str, Any] = {**EVERY, "model": "m", "messages": MESSAGES, "user": "u"}
    del expected["timeout_s"], expected["extra_body"]
    expected |= {"logprobs": True, "top_logprobs": 2, "logit_bias": {"5": -100.0}}
    expected |= {"stop": ["x", "y"], "stop_token_ids": [0, 1]}
    assert body == expected


async def test_every_option_of_a_completion() -> None:
    options: Any = {name: value for name, value in EVERY.items() if name not in CHAT_ONLY}
    _, body = await answer_to(json_reply(completion()), chat=False, **options)
    assert (body["logprobs"], body["prompt_logprobs"], body["mode"]) == (2, 1, "ultra")
    assert body["response_format"] == SCHEMA


@pytest.mark.parametrize("name", sorted(CHAT_ONLY))
async def test_what_only_chats_have(name: str) -> None:
    given: Any = {name: EVERY[name]}  # type: ignore[literal-required]
    with pytest.raises(InvalidRequestError, match=name) as caught:
        await answer_to(json_reply(completion()), chat=False, **given)
    assert caught.value.param == name
    await answer_to(json_reply(completion()), chat=False, **{name: None})


async def test_token_ids_are_asked_for_unless_refused() -> None:
    for options, sent in (({}, True), ({"return_token_ids": None}, True), ({"return_token_ids": False}, False)):
        _, body = await answer_to(json_reply(message()), **options)
        assert body["return_token_ids"] is sent


async def test_mappings_of_any_kind_are_sent() -> None:
    parameters = UserDict(type="object", required=("a",))
    tools = ({"type": "function", "function": UserDict(name="f", parameters=parameters)},)
    _, body = await answer_to(json_reply(message()), tools=tools)
    function = {"name": "f", "parameters": {"type": "object", "required": ["a"]}}
    assert body["tools"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize("wrong", [{"tools": [b"x"]}, {"logit_bias": {1: float("nan")}}, {"cache_salt": object()}])
async def test_what_is_no_json_is_refused_here(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="JSON"):
        await answer_to(json_reply(message()), **wrong)


# What comes back -------------------------------------------------------------------------------------------------


async def test_tool_calls() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]
    found, _ = await answer_to(json_reply(message(tool_calls=calls)))
    assert found.tool_calls == (ToolCall("1", "f", '{"a":1}'), ToolCall("2", "g", ""))
    assert (found.text, found.finish_reason) == ("", "tool_calls")
    assert found.as_message() == {"role": "assistant", "content": None, "tool_calls": calls}
    plain, _ = await answer_to(json_reply(message(content="hi")))
    assert plain.tool_calls == ()
    assert plain.as_message() == {"role": "assistant", "content": "hi"}


async def test_streamed_tool_calls_add_up() -> None:
    found, chunks = await streamed(
        event(role="assistant", content="so "),
        event(tool_calls=[call_part(0, id="1", type="function", name="f", arguments="")]),
        event(tool_calls=[call_part(0, arguments='{"a"')]),
        event(tool_calls=[call_part(1, id="2", name="g", arguments="{"), call_part(0, arguments=":1}")]),
        event(tool_calls=[call_part(1, arguments="}")]),
        event("tool_calls"),
    )
    assert found.tool_calls == (ToolCall("1", "f", '{"a":1}'), ToolCall("2", "g", "{}"))
    assert (found.text, found.finish_reason) == ("so ", "tool_calls")
    assert chunks[1].tool_calls == (ToolCallDelta(0, "1", "f", ""),)
    assert chunks[2].tool_calls == (ToolCallDelta(0, None, None, '{"a"'),)
    assert len(chunks) == 6


async def test_what_a_mode_left_out() -> None:
    told = {"mode": "speed", "trimmed_messages": 4, "trimmed_tokens": 120, "kept_messages": 6}
    mode = AppliedMode("speed", 4, 120, 6)
    whole, _ = await answer_to(json_reply({**message(content="x"), "pimoe": told}))
    assert whole.mode == mode
    found, _ = await streamed({**event(role="assistant", content="x"), "pimoe": told}, event("stop"))
    assert found.mode == mode
    without, _ = await answer_to(json_reply({**completion(), "pimoe": {"mode": "ultra"}}), chat=False)
    assert without.mode == AppliedMode("ultra")
    assert (await answer_to(json_reply(message())))[0].mode is None


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 2}, Usage(9, 2)),
        ({"prompt_tokens": 9}, Usage(9, 0)),
        ({"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": None}, Usage(9, 2, 0)),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}},
            Usage(9, 2, 8),
        ),
    ],
)
async def test_usage_tells_what_was_not_computed(usage: dict[str, Any], expected: Usage) -> None:
    found, _ = await answer_to(json_reply({**message(), "usage": usage}))
    assert found.usage == expected


async def test_the_prompt_s_logprobs_and_tokens_wherever_they_stand() -> None:
    first = {"7": {"logprob": -2.5, "rank": 3, "decoded_token": " b"}}
    likelier = {"9": {"logprob": -0.1, "rank": 1, "decoded_token": " c"}}
    told: dict[str, Any] = {"prompt_logprobs": [None, {**first, **likelier}], "prompt_token_ids": [4, 7]}
    expected = (None, TokenLogprob(" b", -2.5, ((" c", -0.1), (" b", -2.5))))
    of_chat, _ = await answer_to(json_reply({**message(content="x"), **told}))
    of_choice, _ = await answer_to(json_reply(completion(**told)), chat=False)
    for found in (of_chat, of_choice):
        assert found.prompt_logprobs == expected
        assert found.prompt_token_ids == (4, 7)
    assert (await answer_to(json_reply(message())))[0].prompt_logprobs is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"pimoe": "ultra"},
        {"prompt_logprobs": [{"7": {}}]},
        {"prompt_token_ids": ["x"]},
        {"usage": {"prompt_tokens": 1, "prompt_tokens_details": 3}},
        {"choices": [{"message": {"tool_calls": ["f"]}, "finish_reason": "tool_calls"}]},
    ],
)
async def test_answers_of_another_shape(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        await answer_to(json_reply({**message(), **wrong}))


# Tokens ----------------------------------------------------------------------------------------------------------


async def tokens_client(value: object) -> tuple[ScriptedTransport, AsyncClient]:
    transport = ScriptedTransport(json_reply(value))
    return transport, AsyncClient(transport=transport, model="m")


async def test_tokenize() -> None:
    transport, client = await tokens_client(
        {"count": 2, "max_model_len": 512, "tokens": [5, 6], "token_strs": None}
    )
    async with client:
        found = await client.tokenize("hi", add_special_tokens=False)
    assert (found.token_ids, found.count, found.max_model_len, found.token_strs) == ((5, 6), 2, 512, None)
    assert transport.requests[0].path == "/tokenize"
    assert transport.body() == {"model": "m", "prompt": "hi", "add_special_tokens": False}


async def test_tokenize_messages() -> None:
    transport, client = await tokens_client({"count": 1, "tokens": [5], "token_strs": ["Ġa"]})
    async with client:
        found = await client.tokenize(MESSAGES, return_token_strs=True, tools=TOOLS)
    assert (found.token_strs, found.max_model_len) == (("Ġa",), None)
    assert transport.body() == {"model": "m", "messages": MESSAGES, "return_token_strs": True, "tools": TOOLS}


async def test_detokenize() -> None:
    transport, client = await tokens_client({"prompt": "hi"})
    async with client:
        assert await client.detokenize((5, 6)) == "hi"
    assert (transport.requests[0].path, transport.body()) == ("/detokenize", {"model": "m", "tokens": [5, 6]})


@pytest.mark.parametrize("answer", [{}, [], {"tokens": ["x"]}, {"tokens": 3}, 7])
async def test_what_is_no_tokens(answer: object) -> None:
    for call in ("tokenize", "detokenize"):
        _, client = await tokens_client(answer)
        async with client:
            with pytest.raises(ProtocolError):
                await (client.tokenize("hi") if call == "tokenize" else client.detokenize([1]))


async def test_wrong_arguments_are_refused_here() -> None:
    transport, client = await tokens_client({})
    wrong: Any = [1, 2]
    async with client:
        with pytest.raises(InvalidRequestError, match="text or messages"):
            await client.tokenize(wrong)
        wrong = ["x"]
        with pytest.raises(InvalidRequestError, match="integers"):
            await client.detokenize(wrong)
    assert transport.requests == []


def test_arguments_of_tool_calls_are_text_that_a_model_wrote() -> None:
    assert json.loads(json.dumps(ToolCall("1", "f", "{no json").as_json()))["function"]["arguments"] == "{no json"
