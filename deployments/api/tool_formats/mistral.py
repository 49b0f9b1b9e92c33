"""The calls of Mistral's models, after `[TOOL_CALLS]`: a list, `[{"name": ..., "arguments": {...}}]`, or, since
their eleventh tokenizer, a name and its arguments, once per call: `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import re

from .forced import Marks, ToolSet, call_by_name, call_object, repeated
from .json_calls import CallReader, JsonSpan
from .parsing import Format, State, TextParser

_START, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralParser(TextParser):
    """See the module."""

    starts = (_START,)

    def begin(self, start: str) -> State:
        """See `TextParser`."""
        return self._read_kind

    def _read_kind(self) -> bool:
        self.buffer = self.buffer.lstrip()
        if not self.buffer:
            return False
        if self.buffer[0] in "[{":
            self.buffer = self.buffer.removeprefix("[")
            self.state = self._next_object
        else:
            self.state = self._read_name
        return True

    def _next_object(self) -> bool:
        self.buffer = self.buffer.lstrip(" \t\r\n,")
        if not self.buffer:
            return False
        if self.buffer[0] == "{":
            self._call = CallReader(self)
            self.state = self._read_object
        else:  # the list's end, or what has no place in it
            self.buffer = self.buffer.removeprefix("]")
            self.state = self.read_content
        return True

    def _read_object(self) -> bool:
        return self.read_object(self._call, self._next_object)

    def _read_name(self) -> bool:
        at = self.buffer.find("{")
        if at < 0:
            return False
        head, self.buffer = self.buffer[:at], self.buffer[at:]
        if _ARGS in head and head.rpartition(_ARGS)[2].strip():  # the arguments are something else
            self.say(_START + head)
            self.state = self.read_content
            return True
        self.call(re.split(r"\[(?:ARGS|CALL_ID)\]", head)[0].strip())
        self._span = JsonSpan()
        self.state = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        return self.read_arguments(self._span, self.read_content)

    def break_off(self) -> None:
        """See `TextParser`."""
        if self.state in (self._read_name, self._read_kind):
            self.say(_START + self.buffer)
        elif self.state == self._read_object and not self._call.announced:
            self.say(self._call.raw)


class Mistral(Format):
    """See the module."""

    name = "mistral"
    special = (_START, _ARGS, _ID)

    def matches(self, template: str) -> bool:
        """See `ToolFormat`."""
        return _START in template

    def parser(self, tools: ToolSet) -> MistralParser:
        """See `ToolFormat`."""
        return MistralParser()

    def call_id(self, seed: str) -> str:
        """Nine characters: Mistral's templates refuse others."""
        return seed[:9]

    def forced(self, tools: ToolSet, marks: Marks, template: str) -> str | None:
        """See `ToolFormat`."""
        if _ARGS in template:
            return repeated(f"{marks(_START)} call", "", tools.parallel) + call_by_name(tools, marks(_ARGS))
        more = ' (", " call)*' if tools.parallel else ""
        return f'start: {marks(_START)} "[" call{more} "]"\n' + call_object(tools, "arguments")
