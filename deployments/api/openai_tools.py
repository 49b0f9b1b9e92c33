"""Tools of a chat: which functions the model is told of, whether it must call one, and how its calls are read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from ...runtime.errors import InvalidRequestError
from .context import TextCodec
from .fields import Fields
from .tool_formats import Parser, ToolFormat, ToolSet, format_of

_MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True, slots=True)
class Tools:
    """What a chat says of tools.

    Attributes:
        described: for the template, as they came; none where the model is to be told of none.
        known: for what reads the answer.
        format: how the model writes its calls; None where the answer is plain text.
    """

    described: tuple[dict[str, Any], ...] = ()
    known: ToolSet = field(default_factory=lambda: ToolSet({}))
    format: ToolFormat | None = None

    def parser(self) -> Parser | None:
        """For one answer; None where it is plain text."""
        return None if self.format is None else self.format.parser(self.known)

    def visible(self, codec: TextCodec) -> frozenset[int]:
        """Special tokens whose text the parser needs."""
        marks = () if self.format is None else self.format.special
        ids = {codec.added_token_id(mark) for mark in marks}
        return frozenset(codec.special_token_ids & ids)

    def call_id(self, answer: str, choice: int, call: int) -> str:
        """The id of a call: the same whenever the same answer is given, as by the cache."""
        seed = hashlib.sha256(f"{answer} {choice} {call}".encode()).hexdigest()[:32]
        return seed if self.format is None else self.format.call_id(seed)

    def grammar(self, codec: TextCodec) -> str | None:
        """In Lark's notation, where a call is forced; else None.

        Raises:
            InvalidRequestError: calls cannot be forced in this format.
        """
        if not self.known.forced or self.format is None:
            return None

        def mark(text: str) -> str:
            token = codec.added_token_id(text)
            return orjson.dumps(text).decode() if token is None else f"<[{token}]>"

        grammar = self.format.forced(self.known, mark, codec.chat_template)
        if grammar is None:
            raise InvalidRequestError(
                f'tool_choice cannot force a call in this model\'s format, {self.format.name}; use "auto"',
                "tool_choice",
            )
        return grammar


def read_tools(fields: Fields, codec: TextCodec) -> Tools:
    """The tools of a chat's body.

    Raises:
        InvalidRequestError: malformed; the template knows no tools; or its calls are of no format that is known.
    """
    functions = [_function(Fields(item, f"tools[{at}].")) for at, item in enumerate(fields.items("tools") or [])]
    names = [name for name, _ in functions]
    if len(names) > _MAX_TOOLS or len(set(names)) < len(names):
        raise fields.wrong("tools", f"a list of at most {_MAX_TOOLS} functions, each with a name of its own")
    forced = _forced(fields, names)
    parallel = fields.flag("parallel_tool_calls")
    known = ToolSet(dict(functions), forced, parallel is not False)
    format = format_of(codec.chat_template)
    if not functions or fields.values.get("tool_choice") == "none":
        return Tools((), known, format if format is not None and format.always else None)
    if "tools" not in codec.chat_variables:
        raise InvalidRequestError("the model's chat template knows no tools; leave them out", "tools")
    if format is None:
        raise InvalidRequestError(
            "the model's chat template writes tool calls in a format that is not known here, so that they could "
            'not be told from text; leave tools out, or set tool_choice to "none"',
            "tools",
        )
    return Tools(tuple(fields.values["tools"]), known, format)


def _function(fields: Fields) -> tuple[str, dict[str, Any]]:
    fields.only(("type", "function"))
    if fields.values.get("type") != "function":
        raise fields.wrong("type", "function")
    function = fields.child("function")
    function.only(_FUNCTION_FIELDS)
    name = function.text("name")
    if name is None or not _NAME.fullmatch(name):
        raise function.wrong("name", "1 to 64 letters, digits, dots, dashes and underscores")
    function.text("description")
    function.flag("strict")
    parameters = function.child("parameters").values
    return name, parameters


def _forced(fields: Fields, names: list[str]) -> tuple[str, ...]:
    """The functions of which one must be called."""
    choice = fields.values.get("tool_choice")
    right = '"none", "auto", "required", or {"type": "function", "function": {"name": ...}} of a tool'
    if choice is None or choice in ("none", "auto"):
        return ()
    if choice == "required" and names:
        return tuple(names)
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise fields.wrong("tool_choice", right if names else f"{right}; there are no tools")
    child = fields.child("tool_choice")
    child.only(("type", "function"))
    function = child.child("function")
    function.only(("name",))
    name = function.text("name")
    if name is None or name not in names:
        raise function.wrong("name", "the name of one of the tools")
    return (name,)
