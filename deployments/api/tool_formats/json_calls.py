"""Calls that are JSON objects, read character by character: `{"name": "f", "arguments": {...}}`.

An object without a name, or with arguments that are no object, is no call. Arguments may be null, or be an object
that is written in a string; fields after the first of their name are not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Protocol

_SPACE = " \t\r\n"
_KEYS_OF_ARGUMENTS = ("arguments", "parameters")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Target(Protocol):
    """Whoever is told of a call."""

    def call(self, name: str) -> None:
        """A call begins."""
        ...

    def argue(self, text: str) -> None:
        """Its arguments go on."""
        ...


class JsonSpan:
    """Finds where an object or array ends. Whether it is right inside is not looked at."""

    __slots__ = ("_depth", "_escaped", "_in_string", "done")

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> int:
        """How many of these characters belong to it. The first one of all must be a bracket."""
        for count, char in enumerate(text, start=1):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return count
        return len(text)


def is_object(text: str) -> bool:
    """Whether a text is one object, by its braces."""
    text, span = text.strip(_SPACE), JsonSpan()
    return text.startswith("{") and span.push(text) == len(text) and span.done


class CallReader:
    """One call. Its arguments are passed on as they come, from when its name is known.

    Args:
        target: is told of the call once it is certain to be one.
        strict: no other fields than name, arguments and type: anything else is no call, and one without arguments
            is none either.

    Attributes:
        raw: what was read so far, as long as the call is not `announced`.
        failed: it is no call.
        done: its object is complete.
    """

    def __init__(self, target: Target, strict: bool = False) -> None:
        self.raw = ""
        self.announced = self.failed = self.done = False
        self._target, self._strict = target, strict
        self._name: str | None = None
        self._arguments = ""  # those that came before the name
        self._has_arguments = False
        self._reads_arguments = False
        self._read: Callable[[str], int] = self._open
        self._token = ""
        self._key = ""
        self._span = JsonSpan()

    def push(self, text: str) -> str:
        """Reads until it is `done` or has `failed`; gives what it has not used."""
        while text and not (self.done or self.failed):
            count = self._read(text)
            if not self.announced:
                self.raw += text[:count]
            text = text[count:]
        return text

    def _open(self, text: str) -> int:
        if text[0] == "{":
            self._read = self._next
        elif text[0] not in _SPACE:
            self.failed = True
        return 1

    def _next(self, text: str) -> int:
        """Between two fields."""
        char = text[0]
        if char == '"':
            self._token, self._read = char, self._string_of_key
        elif char == "}":
            self._close()
        elif char not in _SPACE + ",":
            self.failed = True
        return 1

    def _string_of_key(self, text: str) -> int:
        count = self._string(text)
        if self._is_closed():
            self._key = _loads(self._token)
            known = self._key in ("name", "type", *_KEYS_OF_ARGUMENTS)
            self.failed = self._strict and not known and not self.announced
            self._read = self._colon
        return count

    def _colon(self, text: str) -> int:
        if text[0] == ":":
            self._read = self._value
        elif text[0] not in _SPACE:
            self.failed = True
        return 1

    def _value(self, text: str) -> int:
        char = text[0]
        if char in _SPACE:
            return 1
        self._token = char
        self._reads_arguments = self._key in _KEYS_OF_ARGUMENTS and not self._has_arguments
        if char == '"':
            self._read = self._string_of_value
        elif char in "{[":
            self.failed = self._key == "name" or (self._reads_arguments and char == "[")
            self._span, self._read = JsonSpan(), self._nested
            return 0
        else:
            self._read = self._scalar
        return 1

    def _string_of_value(self, text: str) -> int:
        count = self._string(text)
        if self._is_closed():
            value = _loads(self._token)
            if self._key == "name":
                self._take_name(value)
            elif self._reads_arguments and value.strip():  # JSON within JSON
                self.failed = not is_object(value)
                if not self.failed:
                    self._argue(value)
            self._read = self._next
        return count

    def _take_name(self, name: str) -> None:
        if self._name is not None:
            return
        self.failed = not name.strip()
        self._name = name
        if self._arguments and not self.failed:
            self._announce()

    def _nested(self, text: str) -> int:
        count = self._span.push(text)
        if self._reads_arguments:
            self._argue(text[:count])
        if self._span.done:
            self._read = self._next
        return count

    def _scalar(self, text: str) -> int:
        """null, true, false or a number: nothing of a call is one, but arguments may be null."""
        if text[0] in ",}":
            self.failed = self._reads_arguments and self._token.strip(_SPACE) != "null"
            self._read = self._next
            return 0
        self._token += text[0]
        return 1

    def _string(self, text: str) -> int:
        for count, char in enumerate(text, start=1):
            self._token += char
            if char == '"' and self._is_closed():
                return count
        return len(text)

    def _is_closed(self) -> bool:
        token = self._token
        escapes = len(token) - 1 - len(token[:-1].rstrip("\\"))
        return len(token) > 1 and token[-1] == '"' and escapes % 2 == 0

    def _argue(self, text: str) -> None:
        self._has_arguments = True
        if self._name is None:
            self._arguments += text
            return
        self._announce()
        self._target.argue(text)

    def _announce(self) -> None:
        if not self.announced and self._name is not None:
            self.announced = True
            self.raw = ""
            self._target.call(self._name)
            self._target.argue(self._arguments)

    def _close(self) -> None:
        self.done = True
        if self._name is None or (self._strict and not self._has_arguments):
            self.failed = True
        elif not self.announced:
            self._announce()
        if self.announced and not self._has_arguments:
            self._target.argue("{}")


def _loads(text: str) -> str:
    """What a string in quotes says. Half of a surrogate pair, which JSON can escape and UTF-8 has no bytes for, is
    replaced as bytes are that are no character."""
    try:
        return _SURROGATE.sub("\ufffd", str(json.loads(text, strict=False)))
    except ValueError:  # an escape that JSON does not know
        return text[1:-1]
