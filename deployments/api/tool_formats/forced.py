"""Grammars that leave a model nothing but to call: in Lark's notation, as llguidance has it.

A mark that is a token of its own is written by its id, `<[5]>`, any other by its text; JSON schemas are inline.
JSON is spaced as chat templates write it, and in no other way: a small model might write blanks for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from ....runtime.errors import InvalidRequestError

# A mark as a term of the grammar.
Marks: TypeAlias = Callable[[str], str]

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The functions of one request.

    Attributes:
        parameters: the JSON schema of each function's arguments, in the request's order; empty for any object.
        forced: those of which one must be called; none: the model may answer in words.
        parallel: whether one answer may call several times.
    """

    parameters: Mapping[str, Mapping[str, Any]]
    forced: tuple[str, ...] = ()
    parallel: bool = True

    def schema(self, name: str) -> Mapping[str, Any]:
        """Of a function's arguments."""
        return self.parameters.get(name) or _ANY_OBJECT


def quoted(text: str) -> str:
    """A text as a term."""
    return orjson.dumps(text).decode()


def inline(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a term.

    Raises:
        TypeError: it is nested too deeply; what is read may be nested deeper than what is written.
    """
    return "%json " + orjson.dumps({**schema, "x-guidance": _SPACING}).decode()


def repeated(one: str, between: str, parallel: bool) -> str:
    """The start rule: `one`, or any number of it."""
    more = f" ({between} {one})*" if between else f" ({one})*"
    return f"start: {one}{more if parallel else ''}\n"


def either(tools: ToolSet) -> str:
    """One of `call_0`, `call_1`, ...: a rule for each of the functions."""
    return " | ".join(f"call_{at}" for at in range(len(tools.forced)))


def call_object(tools: ToolSet, key: str) -> str:
    """The rule `call`: a JSON object with a function's name and, under `key`, its arguments.

    Raises:
        InvalidRequestError: a function's parameters are nested too deeply.
    """
    rules = [f"call: {either(tools)}\n"]
    for at, name in enumerate(tools.forced):
        rules.append(f"call_{at}: {_inline_of(name, _call_schema(name, key, tools), tools)}\n")
    return "".join(rules)


def call_by_name(tools: ToolSet, between: str, before: str = "") -> str:
    """The rule `call`: a function's name, with `before` in front, then `between`, then its arguments.

    Raises:
        InvalidRequestError: a function's parameters are nested too deeply.
    """
    rules = [f"call: {either(tools)}\n"]
    for at, name in enumerate(tools.forced):
        rules.append(f"call_{at}: {quoted(before + name)} {between} arguments_{at}\n")
        rules.append(f"arguments_{at}: {_inline_of(name, tools.schema(name), tools)}\n")
    return "".join(rules)


def _inline_of(name: str, schema: Mapping[str, Any], tools: ToolSet) -> str:
    """`inline` of what is made of a function's parameters."""
    try:
        return inline(schema)
    except TypeError:
        field = f"tools[{list(tools.parameters).index(name)}].function.parameters"
        raise InvalidRequestError(f"{field} must be nested less deeply where a call is forced", field) from None


def _call_schema(name: str, key: str, tools: ToolSet) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: tools.schema(name)},
        "required": ["name", key],
        "additionalProperties": False,
    }
