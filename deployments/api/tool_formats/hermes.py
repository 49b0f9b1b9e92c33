"""The calls of Hermes and of Qwen, any number: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from .forced import Marks, ToolSet, call_object, repeated
from .json_calls import CallReader
from .parsing import Format, State, TextParser

_START, _END = "<tool_call>", "</tool_call>"


class HermesParser(TextParser):
    """See the module."""

    starts = (_START,)

    def begin(self, start: str) -> State:
        """See `TextParser`."""
        self._call = CallReader(self)
        return self._read_call

    def _read_call(self) -> bool:
        self.buffer = self._call.push(self.buffer)
        if self._call.announced and (self._call.done or self._call.failed):
            self.state = self._read_end
        elif self._call.failed:
            self.state = self._read_no_call
        return bool(self.buffer)

    def _read_end(self) -> bool:
        return self.skip_until(_END, self.read_content)

    def _read_no_call(self) -> bool:
        rest = self.take_until(_END)
        if rest is None:
            return False
        self.say(_START + self._call.raw + rest + _END)
        self.state = self.read_content
        return True

    def break_off(self) -> None:
        """See `TextParser`."""
        if not self._call.announced:
            self.say(_START + self._call.raw + self.buffer)


class Hermes(Format):
    """See the module."""

    name = "hermes"
    special = (_START, _END)

    def matches(self, template: str) -> bool:
        """See `ToolFormat`."""
        return _START in template

    def parser(self, tools: ToolSet) -> HermesParser:
        """See `ToolFormat`."""
        return HermesParser()

    def forced(self, tools: ToolSet, marks: Marks, template: str) -> str | None:
        """See `ToolFormat`."""
        one = f'{marks(_START)} "\\n" call "\\n" {marks(_END)}'
        return repeated(one, '"\\n"', tools.parallel) + call_object(tools, "arguments")
