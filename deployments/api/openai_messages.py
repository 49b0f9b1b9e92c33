"""The messages of a chat: checked, and in the form that chat templates read."""

from __future__ import annotations

from typing import Any, TypeAlias

import orjson

from .fields import Fields

Message: TypeAlias = dict[str, Any]

# What others said in an earlier answer of ours, and clients send back: empty, or nothing that a template reads.
_EMPTY_FIELDS = ("refusal", "audio", "function_call", "annotations")
_COMMON_FIELDS = ("role", "content", "name", *_EMPTY_FIELDS)
_REASONING_FIELDS = ("reasoning_content", "reasoning")
# Each template reads it under one of these.
_NAMES_OF_REASONING = (*_REASONING_FIELDS, "thinking")
_FIELDS: dict[str, tuple[str, ...]] = {
    "system": _COMMON_FIELDS,
    "developer": _COMMON_FIELDS,
    "user": _COMMON_FIELDS,
    "assistant": (*_COMMON_FIELDS, *_REASONING_FIELDS, "tool_calls"),
    "tool": (*_COMMON_FIELDS, "tool_call_id"),
}
_ALL_FIELDS = frozenset(name for names in _FIELDS.values() for name in names)


def read_messages(fields: Fields, template: str = "") -> list[Message]:
    """The messages of a chat.

    Args:
        template: the text of the chat template, which decides whether it knows the role "developer".

    Raises:
        InvalidRequestError: none, or one that is malformed.
    """
    messages = fields.items("messages")
    if not messages:
        raise fields.wrong("messages", "a list of at least one message")
    # OpenAI's newer word for "system"; the chat templates of most open models know the old one only.
    developer = "developer" if "developer" in template else "system"
    return [_message(Fields(item, f"messages[{index}]."), developer) for index, item in enumerate(messages)]


def _message(fields: Fields, developer: str) -> Message:
    role = fields.text("role")
    if role is None or role not in _FIELDS:
        raise fields.wrong("role", f"one of {', '.join(_FIELDS)}")
    # Some clients send every field that there is, with null in it.
    empty = [name for name, value in fields.values.items() if name in _ALL_FIELDS and not value]
    fields.only((*_FIELDS[role], *empty))
    for name in _EMPTY_FIELDS:
        if fields.values.get(name):
            raise fields.wrong(name, "absent: it is not supported")
    message: Message = {"role": developer if role == "developer" else role}
    calls = _tool_calls(fields) if role == "assistant" else []
    message["content"] = _content(fields, optional=bool(calls))
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if (text := fields.text(name)) is not None:
            message[name] = text
    reasoning = [text for name in _REASONING_FIELDS if (text := fields.text(name))]
    if reasoning:
        message |= dict.fromkeys(_NAMES_OF_REASONING, reasoning[0])
    return message


def _content(fields: Fields, optional: bool) -> str:
    content = fields.values.get("content")
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""  # most templates add strings to it
    if not isinstance(content, list):
        raise fields.wrong("content", "a string or a list of text parts")
    texts: list[str] = []
    for index, item in enumerate(content):
        part = Fields(item, f"{fields.prefix}content[{index}].")
        if part.values.get("type") != "text":
            raise part.wrong("type", "text; images, audio and files are not supported")
        part.only(("type", "text"))
        text = part.text("text")
        if text is None:
            raise part.wrong("text", "a string")
        texts.append(text)
    return "".join(texts)


def _tool_calls(fields: Fields) -> list[dict[str, Any]]:
    calls = fields.items("tool_calls") or []
    return [_tool_call(Fields(item, f"{fields.prefix}tool_calls[{at}].")) for at, item in enumerate(calls)]


def _tool_call(fields: Fields) -> dict[str, Any]:
    """With its arguments as an object, which templates write in their own way."""
    fields.only(("id", "type", "function", "index"))
    if fields.values.get("type", "function") != "function":
        raise fields.wrong("type", "function")
    function = fields.child("function")
    function.only(("name", "arguments"))
    called = {"name": _required(function, "name"), "arguments": _arguments(function)}
    return {"id": _required(fields, "id"), "type": "function", "function": called}


def _required(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if text is None:
        raise fields.wrong(name, "a string")
    return text


def _arguments(fields: Fields) -> Any:
    given = fields.values.get("arguments")
    if isinstance(given, dict):
        return given
    try:
        arguments = orjson.loads(given or "{}") if isinstance(given, str | None) else None
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise fields.wrong("arguments", "a JSON object, as a string")
    return arguments
