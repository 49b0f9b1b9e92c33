"""Long conversations and prompts: kept off the event loop, and refused before they are tokenized."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import ask
from pimoe.deployments.api.chat_prompt import is_large
from pimoe.runtime.model.tokenizer import Tokenizer
from scripted_chat import ScriptedGateway

USER: Any = {"role": "user", "content": "Hi"}
LONG = "word " * 4000


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.fixture
def gateway(tmp_path: Path) -> ScriptedGateway:
    return ScriptedGateway(tmp_path)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[threading.Thread]]:
    """Where a tokenizer's methods ran."""
    found: dict[str, list[threading.Thread]] = {"encode": [], "decode": [], "render_chat": [], "token_piece": []}
    for name, seen in found.items():
        monkeypatch.setattr(Tokenizer, name, recorded(getattr(Tokenizer, name), seen))
    return found


def recorded(method: Any, seen: list[threading.Thread]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(threading.current_thread())
        return method(*args, **kwargs)

    return call


async def post(gateway: ScriptedGateway, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    reply = await ask(gateway, "POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
    return reply.status, json.loads(reply.body)


@pytest.mark.parametrize(
    ("value", "large"),
    [
        ([USER], False),
        ([USER] * 20, False),
        ([USER] * 1000, True),
        ("a" * 16_000, False),
        ("a" * 17_000, True),
        ([{"content": "a" * 9000, "reasoning_content": "a" * 9000}], True),
        ([{"a": [{"b": ("a" * 9000, None, 5)}, {"c" * 9000: True}]}], True),
        ([[]] * 2000, True),
        ({str(key): key for key in range(2000)}, True),
        (None, False),
    ],
)
def test_all_of_a_conversation_counts(value: object, large: bool) -> None:
    assert is_large(value) is large


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": LONG}]},
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": LONG}, USER]},
        {"messages": [USER] * 1000},
        {"messages": [USER], "tools": [tool(description=LONG)]},
        {"messages": [USER], "chat_template_kwargs": {"documents": [LONG]}},
    ],
)
async def test_what_takes_long_to_render_is_not_rendered_on_the_event_loop(
    gateway: ScriptedGateway, threads: dict[str, list[threading.Thread]], body: dict[str, Any]
) -> None:
    await post(gateway, "/v1/chat/completions", model="echo", **body)
    assert threads["render_chat"]
    # What is encoded after the prompt is the scripted answer.
    assert threading.current_thread() not in threads["render_chat"] + threads["encode"][:1]


async def test_a_short_chat_needs_no_thread(
    gateway: ScriptedGateway, threads: dict[str, list[threading.Thread]]
) -> None:
    status, _ = await post(gateway, "/v1/chat/completions", model="echo", messages=[USER], tools=[tool()])
    assert status == 200
    assert set(threads["render_chat"]) == {threading.current_thread()}


async def test_many_tokens_are_named_and_decoded_off_the_event_loop(
    gateway: ScriptedGateway, threads: dict[str, list[threading.Thread]]
) -> None:
    status, found = await post(gateway, "/tokenize", prompt=LONG, return_token_strs=True)
    assert (status, found["count"]) == (200, len(LONG)), "a text longer than the context can be counted"
    status, text = await post(gateway, "/detokenize", tokens=found["tokens"])
    assert (status, text) == (200, {"prompt": LONG})
    status, error = await post(gateway, "/detokenize", tokens=[*found["tokens"], -1])
    assert (status, error["error"]["param"]) == (400, "tokens")
    here = threading.current_thread()
    assert all(here not in threads[name] for name in ("encode", "decode", "token_piece"))


async def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    gateway: ScriptedGateway, threads: dict[str, list[threading.Thread]]
) -> None:
    """The longest token here has 21 characters, and the context 4000 tokens."""
    text = "a" * 90_000
    message = {"role": "user", "content": text}
    chat = await post(gateway, "/v1/chat/completions", model="echo", messages=[message])
    completion = await post(gateway, "/v1/completions", model="echo", prompt=text)
    for (status, body), param in ((chat, "messages"), (completion, "prompt")):
        assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", param)
    assert not threads["encode"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_json": nested(150)}, "guided_json"),
        ({"guided_json": json.dumps(nested(150))}, "guided_json"),
        ({"structured_outputs": {"json": nested(150)}}, "structured_outputs.json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": nested(150)}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [{**tool(), "function": {"name": "g"}}, tool(parameters=nested(150))],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
        ),
        (
            {
                "tools": [tool(parameters=nested(150))],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            "tools[0].function.parameters",
        ),
    ],
)
@pytest.mark.parametrize("format", ["hermes", "mistral", "llama", "deepseek", "harmony"])
async def test_a_schema_nested_too_deeply_is_the_requests_fault(
    tmp_path: Path, format: str, body: dict[str, Any], param: str
) -> None:
    status, found = await post(
        ScriptedGateway(tmp_path, format), "/v1/chat/completions", model="echo", messages=[USER], **body
    )
    assert (status, found["error"]["param"]) == (400, param)
    assert "nested less deeply" in found["error"]["message"]


async def test_tools_nested_too_deeply_to_force_can_be_offered(gateway: ScriptedGateway) -> None:
    status, found = await post(
        gateway, "/v1/chat/completions", model="echo", messages=[USER], tools=[tool(parameters=nested(30))]
    )
    assert status == 200, found
