"""The parameters of OpenAI and vLLM beyond the plain ones, through the real SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import orjson
import pytest
from fake_gateway import FakeGateway, Reply, served
from fake_gateway import ask as send
from pimoe.runtime.errors import InvalidRequestError, OverloadedError
from scripted_chat import ScriptedGateway

Server = tuple[ScriptedGateway, openai.OpenAI]
USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    gateway = ScriptedGateway(tmp_path_factory.mktemp("checkpoint"))
    with (
        served(gateway) as address,
        openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield gateway, client


@pytest.fixture
def gateway(serving: Server) -> ScriptedGateway:
    serving[0].script("hello")
    return serving[0]


@pytest.fixture
def client(serving: Server) -> openai.OpenAI:
    return serving[1]


def complete(client: openai.OpenAI, prompt: Any = "abc", stream: Any = False, **extra: Any) -> Any:
    return client.completions.create(model="echo", prompt=prompt, stream=stream, extra_body=extra)


def chat(client: openai.OpenAI, stream: Any = False, **extra: Any) -> Any:
    return client.chat.completions.create(model="echo", messages=USER, stream=stream, extra_body=extra)


# What arrives


def test_every_parameter_arrives(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    for call in (complete, chat):
        call(
            client,
            presence_penalty=0.5,
            frequency_penalty=-1,
            repetition_penalty=1.25,
            logit_bias={"11": -100, "3": 2.5, "5": 0},
            prompt_logprobs=2,
            stop=["b", "a", "b"],
            cache_salt="mine",
            temperature=0,
        )
        request = gateway.backend.requests[-1]
        sampling = request.sampling
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.0)
        assert sampling.repetition_penalty == 1.25
        assert sampling.logit_bias == ((3, 2.5), (11, -100.0))
        assert (sampling.logprobs, sampling.prompt_logprobs) == (None, 2)
        assert sampling.stop == ("a", "b")
        assert request.cache_salt == "mine"


SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
TEXT = '{"type":"object","properties":{"b":{"type":"string"},"a":{"type":"integer"}}}'


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, ("", "")),
        ({"response_format": None}, ("", "")),
        ({"response_format": {"type": "json_object"}}, ("json_object", "")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "description": "d", "schema": SCHEMA, "strict": True},
                }
            },
            ("json_schema", TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", TEXT)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, ("json_schema", TEXT)),
        ({"structured_outputs": {"json_object": True}}, ("json_object", "")),
        ({"structured_outputs": {"regex": r"\p{L}+"}}, ("regex", r"\p{L}+")),
        ({"structured_outputs": {"choice": ["a", "é"]}}, ("choice", '["a","é"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ("lark", 'start: "a"')),
        ({"guided_json": SCHEMA}, ("json_schema", TEXT)),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["x"]}, ("choice", '["x"]')),
        ({"guided_grammar": 'start: "b"', "response_format": {"type": "text"}}, ("lark", 'start: "b"')),
    ],
)
def test_structured_output(
    client: openai.OpenAI, gateway: ScriptedGateway, fields: dict[str, Any], grammar: tuple[str, str]
) -> None:
    for call in (complete, chat):
        call(client, **fields)
        sampling = gateway.backend.requests[-1].sampling
        assert (sampling.grammar_kind, sampling.grammar) == grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}},
            "response_format.json_schema.strict",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"pattern": "a"}}, "structured_outputs.pattern"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_grammar": "x" * (1 << 18) + "x"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_wrong_structured_output(
    client: openai.OpenAI, gateway: ScriptedGateway, fields: dict[str, Any], param: str
) -> None:
    for call in (complete, chat):
        with pytest.raises(openai.BadRequestError) as refused:
            call(client, **fields)
        assert refused.value.param == param
    assert not gateway.backend.requests


async def test_a_grammar_that_is_refused_behind_the_gateway_is_told_by_its_field() -> None:
    error = InvalidRequestError("the regular expression is not accepted", "grammar")
    for fields, param in (
        ({"guided_regex": "["}, "guided_regex"),
        ({"structured_outputs": {"regex": "["}, "stream": True}, "structured_outputs"),
        ({}, "grammar"),
    ):
        found = await post(FakeGateway(error=error), "/v1/completions", model="echo", prompt="a", **fields)
        assert (found["error"]["param"], found["error"]["message"]) == (param, error.message)


def test_the_end_of_a_prompt(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    for truncate, expected in ((3, b"xyz"), (100, b"abxyz"), (None, b"abxyz")):
        complete(client, "abxyz", truncate_prompt_tokens=truncate)
        assert gateway.backend.requests[-1].prompt_token_ids == tuple(expected)
    complete(client, ["abxyz", "uvw"], truncate_prompt_tokens=2)
    assert [request.prompt_token_ids for request in gateway.backend.requests[-2:]] == [tuple(b"yz"), tuple(b"vw")]
    complete(client, "x" * 5000 + "end", truncate_prompt_tokens=-1, max_tokens=100)
    assert len(gateway.backend.requests[-1].prompt_token_ids) == 3900
    chat(client, truncate_prompt_tokens=4)
    assert gateway.backend.requests[-1].prompt_token_ids == tuple(b"ant\n")


async def test_the_tokenizers_own_special_tokens() -> None:
    """A prompt has them, a chat's template writes its own; either can be told otherwise."""
    gateway = FakeGateway()
    for path, prompt, default in (
        ("/v1/completions", {"prompt": "hi"}, True),
        ("/v1/chat/completions", {"messages": USER}, False),
    ):
        for asked, expected in ((None, default), (True, True), (False, False)):
            body = {"model": "echo", **prompt, "add_special_tokens": asked}
            await send(gateway, "POST", path, orjson.dumps(body))
            assert (gateway.generated[-1].prompt_token_ids[0] == 256) == expected


def test_a_last_message_is_continued(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    gateway.script(" world")
    messages: Any = [*USER, {"role": "assistant", "content": "hello "}]
    answer = client.chat.completions.create(
        model="echo",
        messages=messages,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    prompt = gateway.backend.tokenizer.decode(
        gateway.backend.requests[-1].prompt_token_ids, skip_special_tokens=False
    )
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello "
    assert answer.choices[0].message.content == " world"
    client.chat.completions.create(model="echo", messages=messages, extra_body={"add_generation_prompt": False})
    prompt = gateway.backend.tokenizer.decode(
        gateway.backend.requests[-1].prompt_token_ids, skip_special_tokens=False
    )
    assert prompt.endswith("<|im_start|>assistant\nhello <|im_end|>\n")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="echo",
            messages=[*USER, {"role": "assistant", "content": ""}],
            extra_body={"continue_final_message": True},
        )
    assert refused.value.param == "continue_final_message"


# What is told


def test_why_it_stopped(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    for fields, text, reason, stopped in (
        ({}, "hello", "stop", None),
        ({"stop": ["x", "lo"]}, "hel", "stop", "lo"),
        ({"stop": ["lo"], "include_stop_str_in_output": True}, "hello", "stop", "lo"),
        ({"stop": ["el"], "include_stop_str_in_output": True}, "hel", "stop", "el"),
        ({"max_tokens": 2}, "he", "length", None),
    ):
        choice = complete(client, **fields).choices[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (text, reason, stopped)
        choice = chat(client, **fields).choices[0]
        assert (choice.message.content, choice.finish_reason, choice.stop_reason) == (text, reason, stopped)
        last = list(complete(client, stream=True, **fields))[-1].choices[0]
        assert (last.finish_reason, last.stop_reason) == (reason, stopped)


def test_a_stop_token_is_told_by_its_id(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    end = gateway.backend.model.eos_token_ids[0]
    choice = complete(client, ignore_eos=True, stop_token_ids=[end]).choices[0]
    assert (choice.text, choice.stop_reason) == ("hello", end)
    # The model's own end is no reason to tell, whether it is named besides or not.
    assert complete(client, stop_token_ids=[end]).choices[0].stop_reason is None


def test_special_tokens_shown(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    gateway.script("a<|start|>b<|end|><tool_call>")
    for size in (1, 2, 10):
        gateway.backend.size = size
        assert complete(client).choices[0].text == "ab<tool_call>"
        shown = complete(client, skip_special_tokens=False, logprobs=0, stop=["zz"]).choices[0]
        assert shown.text == "a<|start|>b<|end|><tool_call>"
        assert shown.logprobs.text_offset == [0, 1, 10, 11, 18, 29]
        # Stop strings are looked for in the text without them.
        assert complete(client, skip_special_tokens=False, stop=["ab"], min_tokens=1).choices[0].text == ""


def test_token_ids_of_prompts_and_answers(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    end = gateway.backend.model.eos_token_ids[0]
    choices = complete(client, ["abc", "de"], return_token_ids=True, n=2).choices
    assert [choice.prompt_token_ids for choice in choices] == [[*b"abc"]] * 2 + [[*b"de"]] * 2
    assert choices[0].token_ids == [*b"hello", end]
    answer = chat(client, return_token_ids=True)
    assert answer.prompt_token_ids == list(gateway.backend.requests[-1].prompt_token_ids)
    chunks = list(complete(client, return_token_ids=True, stream=True))
    told = [chunk.choices[0].model_extra.get("prompt_token_ids") for chunk in chunks]
    assert told == [[*b"abc"]] + [None] * (len(chunks) - 1)
    plain = complete(client).choices[0].model_extra
    assert not {"token_ids", "prompt_token_ids", "prompt_logprobs"} & plain.keys()


def test_tokens_named_by_id(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    choice = complete(client, logprobs=1, return_tokens_as_token_ids=True, max_tokens=1).choices[0]
    assert choice.logprobs.tokens == ["token_id:104"]
    assert choice.logprobs.top_logprobs == [{"token_id:105": -0.25, "token_id:104": -0.5}]


def test_prompt_logprobs(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    first, second, _ = told = complete(client, "abc", prompt_logprobs=1, n=2).choices[1].prompt_logprobs
    assert len(told) == 3
    assert first is None
    assert second == {
        "98": {"logprob": -0.5, "rank": 2, "decoded_token": "b"},
        "99": {"logprob": -0.25, "rank": 1, "decoded_token": "c"},
    }
    answer = chat(client, prompt_logprobs=0)
    assert len(answer.prompt_logprobs) == len(gateway.backend.requests[-1].prompt_token_ids)
    assert all(len(entry) == 1 for entry in answer.prompt_logprobs[1:])
    with pytest.raises(openai.BadRequestError, match="stream"):
        complete(client, prompt_logprobs=1, stream=True)


# Echo


def test_echo(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    assert complete(client, "ab", echo=True).choices[0].text == "abhello"
    assert complete(client, [97, 98], echo=True).choices[0].text == "abhello"
    texts = [choice.text for choice in complete(client, ["ab", "cd"], echo=True, n=2).choices]
    assert texts == ["abhello"] * 2 + ["cdhello"] * 2
    assert gateway.backend.requests[-1].sampling.prompt_logprobs is None
    chunks = list(complete(client, ["ab", "cd"], echo=True, stream=True))
    for index, expected in enumerate(("abhello", "cdhello")):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: openai.OpenAI, gateway: ScriptedGateway, stream: bool) -> None:
    answer = complete(client, "aé", echo=True, logprobs=1, max_tokens=2, stream=stream)
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    text = ""
    for part in answer if stream else [answer]:
        text += part.choices[0].text
        for name, values in found.items():
            values += getattr(part.choices[0].logprobs, name)
    assert text == "aéhe"
    assert found["tokens"] == ["a", "\ufffd", "\ufffd", "h", "e"]
    assert found["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][3] == {"i": -0.25, "h": -0.5}
    assert found["text_offset"] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_only_an_echo(client: openai.OpenAI, gateway: ScriptedGateway, stream: bool) -> None:
    extra: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = complete(client, "abc", echo=True, logprobs=0, max_tokens=0, **extra)
    first, *rest = list(answer) if stream else [answer]
    assert first.choices[0].text == "abc"
    assert first.choices[0].finish_reason == "length"
    assert first.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5]
    usage = rest[-1].usage if stream else first.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 0)
    assert gateway.backend.requests[-1].sampling.max_tokens == 1
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, "abc", max_tokens=0)
    assert refused.value.param == "max_tokens"


def test_how_lm_eval_scores_a_continuation(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    """As its `local-completions` model sends and reads it: the logprobs of the prompt's last tokens."""
    body: Any = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = client.completions.create(model="echo", prompt=[[*b"ctx", *b"end"], [*b"a", *b"b"]], **body)
    scores = []
    for choice, context in zip(sorted(answer.choices, key=lambda choice: choice.index), (3, 1), strict=True):
        logprobs: Any = choice.logprobs
        values = logprobs.token_logprobs[context:-1]
        greedy = all(
            token == max(top, key=top.__getitem__)
            for token, top in zip(logprobs.tokens[context:-1], logprobs.top_logprobs[context:-1], strict=True)
        )
        scores.append((sum(values), greedy))
    assert scores == [(-1.5, False), (-0.5, False)]


# Usage and streams


def test_cached_tokens_are_told_once_for_each_prompt(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    usage = complete(client, ["abcd", "ef"], n=3).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 36)
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_usage_in_every_chunk(client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    gateway.script("hello", size=2)
    options = {"include_usage": True, "continuous_usage_stats": True}
    for call, prompt in ((complete, 3), (chat, None)):
        chunks = list(call(client, stream=True, stream_options=options, n=2, seed=1))
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == [2, 4, 6, 8, 10, 12, 12]
        assert {chunk.usage.prompt_tokens for chunk in chunks} == {prompt or chunks[0].usage.prompt_tokens}
        assert chunks[-1].choices == []
    chunks = list(complete(client, stream=True, stream_options={"continuous_usage_stats": True}))
    assert all(chunk.usage is None for chunk in chunks)


async def test_an_error_in_a_streamed_chat(gateway: ScriptedGateway, client: openai.OpenAI) -> None:
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
        with pytest.raises(openai.BadRequestError) as refused:
            await other.chat.completions.create(model="echo", messages=USER, max_tokens=10**6, stream=True)
        assert refused.value.code == "context_length_exceeded"


async def test_an_error_after_the_first_chunk_has_openais_shape() -> None:
    gateway = FakeGateway(fail_after=1, error=OverloadedError("shed"))
    body = {"model": "echo", "messages": USER, "stream": True, "n": 2, "seed": 1}
    reply = await send(gateway, "POST", "/v1/chat/completions", orjson.dumps(body))
    *_, last, _end = reply.body.split(b"\n\n")
    error = orjson.loads(last.removeprefix(b"data: "))["error"]
    assert error == {"message": "shed", "type": "rate_limit_error", "param": None, "code": "overloaded"}


# Tokens and models


async def post(gateway: FakeGateway, path: str, **body: Any) -> Any:
    reply: Reply = await send(gateway, "POST", path, orjson.dumps(body))
    return orjson.loads(reply.body)


async def test_tokenize(gateway: ScriptedGateway) -> None:
    found = await post(gateway, "/tokenize", model="echo", prompt="a é<|end|>")
    end = gateway.backend.tokenizer.added_token_id("<|end|>")
    assert found == {"count": 5, "max_model_len": 4000, "tokens": [*"a é".encode(), end], "token_strs": None}
    found = await post(gateway, "/tokenize", prompt="a b", return_token_strs=True)
    assert found["token_strs"] == ["a", "Ġ", "b"]
    assert (await post(gateway, "/tokenize", prompt=""))["tokens"] == []
    plain = FakeGateway()
    assert (await post(plain, "/tokenize", prompt="a"))["tokens"] == [256, 97]
    assert (await post(plain, "/tokenize", prompt="a", add_special_tokens=False))["tokens"] == [97]


async def test_tokenize_a_chat_gives_the_prompt_of_that_chat(
    gateway: ScriptedGateway, client: openai.OpenAI
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for extra in (
        {},
        {"tools": tools},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"reasoning_effort": "low"},
    ):
        found = await post(gateway, "/tokenize", messages=USER, **extra)
        await post(gateway, "/v1/chat/completions", model="echo", messages=USER, **extra)
        assert tuple(found["tokens"]) == gateway.backend.requests[-1].prompt_token_ids
        assert found["count"] == len(found["tokens"])


async def test_detokenize(gateway: ScriptedGateway) -> None:
    text = "a é<|end|><tool_call>"
    tokens = (await post(gateway, "/tokenize", prompt=text))["tokens"]
    assert await post(gateway, "/detokenize", model="echo", tokens=tokens) == {"prompt": text}
    assert await post(gateway, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "stream": True}, "stream"),
        ("/detokenize", {"tokens": [5000]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_wrong_tokens(gateway: ScriptedGateway, path: str, body: dict[str, Any], param: str) -> None:
    assert (await post(gateway, path, **body))["error"]["param"] == param


async def test_without_a_tokenizer_there_are_no_tokens() -> None:
    gateway = FakeGateway(tokenizer=None)
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert "no tokenizer" in (await post(gateway, path, **body))["error"]["message"]


def test_what_vllms_clients_read_of_a_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    extra: Any = model.model_extra
    assert (extra["max_model_len"], extra["root"], extra["parent"]) == (4000, "echo", None)
