"""Tools through the real `openai` SDK: what the template is told, what is read out of answers, what is forced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_gateway import served
from pydantic import BaseModel
from scripted_chat import MARKS, ScriptedGateway

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [WEATHER, NOW]
USER: Any = [{"role": "user", "content": "How is Paris?"}]
ARGUMENTS = '{"city": "Pàris"}'

# A text, then a call of `weather`, then one of `now`.
CALLS = {
    "hermes": f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "mistral": f'I look.[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}, '
    '{"name": "now", "arguments": {}}]',
    "deepseek": "I look.<｜tool▁calls▁begin｜>"
    f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
    "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}",
    "qwen3-coder": "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nPàris\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
}


class Served:
    """One gateway for each format, served on demand."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._open: dict[str, tuple[ScriptedGateway, Any, openai.OpenAI]] = {}

    def __call__(self, format: str | None) -> tuple[ScriptedGateway, openai.OpenAI]:
        name = str(format)
        if name not in self._open:
            gateway = ScriptedGateway(self._folders.mktemp("checkpoint"), format)
            context = served(gateway)
            client = openai.OpenAI(base_url=f"http://{context.__enter__()}/v1", api_key="none", max_retries=0)
            self._open[name] = gateway, context, client
        gateway, _, client = self._open[name]
        return gateway, client

    def close(self) -> None:
        for _, context, client in self._open.values():
            client.close()
            context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    serving = Served(tmp_path_factory)
    try:
        yield serving
    finally:
        serving.close()


@pytest.fixture
def hermes(serving: Served) -> tuple[ScriptedGateway, openai.OpenAI]:
    return serving("hermes")


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "echo", "messages": USER, "tools": TOOLS, **fields})


def prompt_of(gateway: ScriptedGateway) -> str:
    return gateway.backend.tokenizer.decode(
        gateway.backend.requests[-1].prompt_token_ids, skip_special_tokens=False
    )


def assembled(stream: Any) -> tuple[str | None, list[dict[str, str]], str]:
    """A stream as a client puts it together: content, calls, finish reason."""
    content: str | None = None
    calls: list[dict[str, str]] = []
    reason = ""
    for chunk in stream:
        (choice,) = chunk.choices
        assert not reason
        reason = choice.finish_reason or ""
        if choice.delta.content is not None:
            content = (content or "") + choice.delta.content
        for call in choice.delta.tool_calls or []:
            if call.index == len(calls):
                assert call.type == "function"
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            else:
                assert (call.id, call.type, call.function.name) == (None, None, None)
            calls[call.index]["arguments"] += call.function.arguments
    return content, calls, reason


@pytest.mark.parametrize("format", CALLS)
def test_calls_whole_and_streamed_at_every_cut(serving: Served, format: str) -> None:
    gateway, client = serving(format)
    gateway.script(CALLS[format])
    message = ask(client, temperature=0).choices[0].message
    assert message.content == "I look."
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("weather", {"city": "Pàris"}),
        ("now", {}),
    ]
    ids = [call.id for call in message.tool_calls]
    assert len(set(ids)) == 2
    assert all(len(call) == (9 if format == "mistral" else 29) for call in ids)
    for size in (1, 2, 3, 7, 50, 1000):
        gateway.script(CALLS[format], size=size)
        content, calls, reason = assembled(ask(client, stream=True))
        assert (content, reason) == ("I look.", "tool_calls")
        assert [(call["name"], call["arguments"]) for call in calls] == [
            (call.function.name, call.function.arguments) for call in message.tool_calls
        ]


@pytest.mark.parametrize("format", ["hermes", "mistral", "llama"])
def test_half_a_character_in_a_name_is_replaced(serving: Served, format: str) -> None:
    gateway, client = serving(format)
    written = '{"name": "f\\ud800", "parameters": {}}'
    before, after = {
        "hermes": ("<tool_call>", "</tool_call>"),
        "mistral": ("[TOOL_CALLS][", "]"),
        "llama": ("", ""),
    }[format]
    gateway.script(before + written + after)
    (call,) = ask(client).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("f\ufffd", "{}")
    content, calls, reason = assembled(ask(client, stream=True))
    assert (content, reason) == (None, "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls] == [("f\ufffd", "{}")]


@pytest.mark.parametrize("written", ['{"name": "", "arguments": {}}', '{"name": "now", "arguments": [1]}'])
def test_a_call_without_a_name_or_with_other_arguments_is_text(
    hermes: tuple[ScriptedGateway, openai.OpenAI], written: str
) -> None:
    gateway, client = hermes
    text = f"<tool_call>{written}</tool_call>"
    gateway.script(text)
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    assert assembled(ask(client, stream=True)) == (text, [], "stop")


def test_a_call_alone_has_no_content(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script('<tool_call>{"name": "now"}</tool_call>')
    choice = ask(client).choices[0]
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.arguments == "{}"
    content, calls, _ = assembled(ask(client, stream=True))
    assert content is None
    assert [call["name"] for call in calls] == ["now"]


def test_an_answer_in_words(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script("It is <b>fine</b>. ")
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("It is <b>fine</b>. ", None)
    assert choice.finish_reason == "stop"
    assert assembled(ask(client, stream=True)) == ("It is <b>fine</b>. ", [], "stop")


def test_a_call_that_breaks_off_has_finish_reason_length(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script(CALLS["hermes"])
    choice = ask(client, max_tokens=60).choices[0]
    assert choice.finish_reason == "length"
    assert ARGUMENTS.startswith(choice.message.tool_calls[0].function.arguments)


def test_the_ids_of_a_cached_answer_are_the_computed_ones(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script(CALLS["hermes"])
    answers = [ask(client, temperature=0, n=2, seed=1) for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(gateway.backend.requests) == 1
    ids = {call.id for choice in answers[0].choices for call in choice.message.tool_calls}
    assert len(ids) == 4
    streamed = assembled(ask(client, temperature=0, seed=1, stream=True))
    assert [call["id"] for call in streamed[1]] == [call.id for call in answers[0].choices[0].message.tool_calls]


def test_what_the_template_is_told(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script("Fine.")
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        *USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    ask(client, messages=messages, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert prompt_of(gateway) == (
        "<|im_start|>system\n"
        + "".join(json.dumps(tool) + "\n" for tool in TOOLS)
        + MARKS["hermes"]
        + "<|im_end|>\n"
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow is Paris?<|im_end|>\n"
        f"<|im_start|>assistant\n(hm)[c1 weather {ARGUMENTS}]<|im_end|>\n<|im_start|>tool\nsun(c1)<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>"
    )


def test_an_answer_can_be_sent_back_as_the_sdk_has_it(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script(CALLS["hermes"], "Sunny.")
    message = ask(client).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in message.tool_calls]
    for sent in (message, message.model_dump()):
        answer = ask(client, messages=[*USER, sent, *results])
        assert answer.choices[0].message.content == "Sunny."
        assert f'[{message.tool_calls[0].id} weather {{"city": "Pàris"}}]' in prompt_of(gateway)


def test_with_none_the_model_is_told_of_no_tools(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script(CALLS["hermes"])
    choice = ask(client, tool_choice="none").choices[0]
    assert "weather" not in prompt_of(gateway)
    assert choice.message.content == CALLS["hermes"]
    assert choice.finish_reason == "stop"


def test_one_call_at_most(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script(CALLS["hermes"])
    message = ask(client, parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["weather"]
    _, calls, _ = assembled(ask(client, parallel_tool_calls=False, stream=True))
    assert [call["name"] for call in calls] == ["weather"]


@pytest.mark.parametrize("format", ["hermes", "mistral", "llama", "deepseek", "harmony"])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "now"}), ({"type": "function", "function": {"name": "now"}}, {"now"})],
)
def test_forced_calls_come_with_a_grammar(serving: Served, format: str, choice: Any, names: set[str]) -> None:
    gateway, client = serving(format)
    gateway.script("x")
    ask(client, tool_choice=choice)
    sampling = gateway.backend.requests[-1].sampling
    assert sampling.grammar_kind == "lark"
    assert {name for name in ("weather", "now") if name in sampling.grammar} == names


def test_calls_that_cannot_be_forced(serving: Served) -> None:
    _, client = serving("qwen3-coder")
    with pytest.raises(openai.BadRequestError, match="cannot force") as refused:
        ask(client, tool_choice="required")
    assert refused.value.param == "tool_choice"
    _, client = serving("hermes")
    with pytest.raises(openai.BadRequestError, match="another format"):
        ask(client, tool_choice="required", response_format={"type": "json_object"})


def test_templates_without_tools(serving: Served, tmp_path: Any) -> None:
    _, client = serving("unknown")
    with pytest.raises(openai.BadRequestError, match="format that is not known") as refused:
        ask(client)
    assert refused.value.param == "tools"
    assert ask(client, tool_choice="none").choices[0].message.tool_calls is None
    _, client = serving(None)
    with pytest.raises(openai.BadRequestError, match="no tools"):
        ask(client)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="echo", messages=USER)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice.function.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "chat_template_kwargs.tools"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"extra_body": {"continue_final_message": True, "add_generation_prompt": True}}, "add_generation_prompt"),
    ],
)
def test_wrong_tools(hermes: tuple[ScriptedGateway, openai.OpenAI], fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(hermes[1], **fields)
    assert refused.value.param == param


def test_reasoning_effort_goes_to_templates_that_read_it(
    serving: Served, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gateway, client = serving("hermes")
    gateway.script("x")
    ask(client, reasoning_effort="low")
    assert prompt_of(gateway).endswith("<|im_start|>assistant\nlow")


def test_harmony_tells_reasoning_apart_without_tools(serving: Served) -> None:
    gateway, client = serving("harmony")
    gateway.script("<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Fine.")
    message = client.chat.completions.create(model="echo", messages=USER).choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("Fine.", "Easy.")
    chunks = list(client.chat.completions.create(model="echo", messages=USER, stream=True))
    deltas: Any = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Fine."
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "Easy."
    plain = client.chat.completions.create(model="echo", messages=USER, extra_body={"include_reasoning": False})
    assert "reasoning_content" not in (plain.choices[0].message.model_extra or {})


def test_logprobs_and_ids_of_a_streamed_call_are_all_told(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script(CALLS["hermes"], size=3)
    extra = {"return_token_ids": True}
    chunks = list(ask(client, stream=True, logprobs=True, extra_body=extra))
    ids = [token for chunk in chunks for token in chunk.choices[0].model_extra["token_ids"]]
    assert ids == [*gateway.backend.tokenizer.encode(CALLS["hermes"]), *gateway.backend.model.eos_token_ids]
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks) == len(ids)


# The SDK's helpers


class Weather(BaseModel):
    city: str


def test_the_sdks_stream_helper(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script('I look. <tool_call>{"name": "Weather", "arguments": {"city": "Paris"}}</tool_call>', size=4)
    tool = openai.pydantic_function_tool(Weather)
    with client.chat.completions.stream(model="echo", messages=USER, tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert kinds.count("content.done") == 1
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Paris")
    assert final.choices[0].message.content == "I look."
    assert final.choices[0].finish_reason == "tool_calls"


def test_the_sdks_parse_helper(hermes: tuple[ScriptedGateway, openai.OpenAI]) -> None:
    gateway, client = hermes
    gateway.script('{"city": "Paris"}', size=3)
    answer = client.chat.completions.parse(model="echo", messages=USER, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Paris")
    sampling = gateway.backend.requests[-1].sampling
    assert sampling.grammar_kind == "json_schema"
    assert json.loads(sampling.grammar)["properties"]["city"]["type"] == "string"
    with client.chat.completions.stream(model="echo", messages=USER, response_format=Weather) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Weather(city="Paris")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="echo", messages=USER, response_format=Weather, max_tokens=3)


async def test_the_async_sdk(serving: Served) -> None:
    gateway, sync = serving("hermes")
    gateway.script(CALLS["hermes"], size=2)
    async with openai.AsyncOpenAI(base_url=sync.base_url, api_key="none", max_retries=0) as client:
        tool = openai.pydantic_function_tool(Weather, name="weather")
        async with client.chat.completions.stream(model="echo", messages=USER, tools=[tool, *TOOLS[1:]]) as stream:
            final = await stream.get_final_completion()
        calls = final.choices[0].message.tool_calls or []
        assert [call.function.name for call in calls] == ["weather", "now"]
        assert calls[0].function.parsed_arguments == Weather(city="Pàris")
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="echo", messages=[], tools=TOOLS)
