"""What an answer must match: OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_*`, as the
kind and text of one grammar.

A JSON schema keeps the order of its keys, which is the order that properties are written in; otherwise equal
schemas are equal texts, so that the cache sees them as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import orjson

from ...runtime.errors import InvalidRequestError
from ...runtime.requests import GrammarKind
from .fields import Fields

Grammar: TypeAlias = tuple[GrammarKind, str]

NO_GRAMMAR: Grammar = ("", "")
STRUCTURED_FIELDS = frozenset(
    ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
)
_MAX_CHARS = 1 << 18
_MAX_CHOICES = 1024
# Options of vLLM's that change what is generated, with the values that they do not change it with.
_NEUTRAL_OPTIONS = {
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "disable_fallback": False,
    "whitespace_pattern": None,
    "structural_tag": None,
    "backend": None,
}


def read_grammar(fields: Fields) -> tuple[Grammar, str]:
    """The grammar that a body asks for, and the field that does; `NO_GRAMMAR` where none does.

    Raises:
        InvalidRequestError: malformed, too long, or more than one of them.
    """
    found = [(name, read(fields)) for name, read in _READERS.items() if fields.values.get(name) is not None]
    asked = [(name, grammar) for name, grammar in found if grammar != NO_GRAMMAR]
    if len(asked) > 1:
        name, other = asked[1][0], asked[0][0]
        raise InvalidRequestError(f"{name} and {other} are both there; an answer can match only one", name)
    if not asked:
        return NO_GRAMMAR, ""
    name, grammar = asked[0]
    if len(grammar[1]) > _MAX_CHARS:
        raise InvalidRequestError(f"{name} has {len(grammar[1])} characters; at most {_MAX_CHARS}", name)
    return grammar, name


def _response_format(fields: Fields) -> Grammar:
    child = fields.child("response_format")
    kind = child.text("type")
    if kind == "json_schema":
        child.only(("type", "json_schema"))
        wrapper = child.child("json_schema")
        wrapper.only(("name", "description", "schema", "strict"))
        for name in ("name", "description"):
            wrapper.text(name)
        wrapper.flag("strict")
        return _json(wrapper, "schema")
    if kind not in ("text", "json_object"):
        raise child.wrong("type", "text, json_object or json_schema")
    child.only(("type",))
    return ("json_object", "") if kind == "json_object" else NO_GRAMMAR


def _structured_outputs(fields: Fields) -> Grammar:
    child = fields.child("structured_outputs")
    child.only((*_OUTPUTS, *_NEUTRAL_OPTIONS))
    for name, neutral in _NEUTRAL_OPTIONS.items():
        if child.values.get(name) not in (None, neutral):
            raise child.wrong(name, "absent: it is not supported")
    given = [name for name in _OUTPUTS if child.values.get(name) not in (None, False)]
    if len(given) != 1:
        raise fields.wrong("structured_outputs", f"an object with one of {', '.join(_OUTPUTS)}")
    return _OUTPUTS[given[0]](child, given[0])


def _json(fields: Fields, name: str) -> Grammar:
    value: Any = fields.values.get(name)
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise fields.wrong(name, "a JSON schema") from None
    if not isinstance(value, dict):
        raise fields.wrong(name, "a JSON schema, which is an object")
    try:
        return "json_schema", orjson.dumps(value).decode()
    except TypeError:  # what is read may be nested deeper than what is written
        raise fields.wrong(name, "nested less deeply") from None


def _any_json(fields: Fields, name: str) -> Grammar:
    fields.flag(name)
    return "json_object", ""


def _regex(fields: Fields, name: str) -> Grammar:
    return "regex", _text(fields, name)


def _lark(fields: Fields, name: str) -> Grammar:
    return "lark", _text(fields, name)


def _choice(fields: Fields, name: str) -> Grammar:
    choices = fields.items(name) or []
    if not 0 < len(choices) <= _MAX_CHOICES or not all(isinstance(choice, str) and choice for choice in choices):
        raise fields.wrong(name, f"a list of 1 to {_MAX_CHOICES} strings that are not empty")
    return "choice", orjson.dumps(choices).decode()


def _text(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if not text:
        raise fields.wrong(name, "a string that is not empty")
    return text


_OUTPUTS: dict[str, Callable[[Fields, str], Grammar]] = {
    "json": _json,
    "json_object": _any_json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
}
_READERS: dict[str, Callable[[Fields], Grammar]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": lambda fields: _json(fields, "guided_json"),
    "guided_regex": lambda fields: _regex(fields, "guided_regex"),
    "guided_choice": lambda fields: _choice(fields, "guided_choice"),
    "guided_grammar": lambda fields: _lark(fields, "guided_grammar"),
}
