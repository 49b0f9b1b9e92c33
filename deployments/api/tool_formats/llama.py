"""The calls of Llama 3.1 and later: the whole answer is `{"name": ..., "parameters": {...}}`, or several of them
with `;` between, perhaps after `<|python_tag|>`."""

from __future__ import annotations

from ....runtime.generation.stopping import held_back
from .forced import Marks, ToolSet, call_object, repeated
from .json_calls import CallReader
from .parsing import Format, State, TextParser

_TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;,"


class LlamaParser(TextParser):
    """See the module. An object that is no call is text, and so is all that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.state: State = self._read_start
        self._space = ""

    def _read_start(self) -> bool:
        """Where the next call would begin."""
        text = self.buffer.lstrip(_BETWEEN)
        self._space += self.buffer[: len(self.buffer) - len(text)]
        self.buffer = text
        if not text or held_back(text, (_TAG,)) == len(text):
            return False
        if text.startswith((_TAG, "{")):
            self._space = ""
            self.buffer = text.removeprefix(_TAG).lstrip()
            self._call = CallReader(self, strict=True)
            self.state = self._read_call
        else:
            self.buffer = self._space + text
            self.state = self.read_content
        return True

    def _read_call(self) -> bool:
        if not self._call.raw and not self._call.announced:
            self.buffer = self.buffer.lstrip()
        return self.read_object(self._call, self._read_start)

    def break_off(self) -> None:
        """See `TextParser`."""
        if self.state == self._read_start:
            self.say(self._space + self.buffer)
        elif not self._call.announced:
            self.say(self._call.raw)


class Llama(Format):
    """See the module."""

    name = "llama"
    special = (_TAG,)

    def matches(self, template: str) -> bool:
        """See `ToolFormat`."""
        return '"parameters"' in template and "<|start_header_id|>" in template

    def parser(self, tools: ToolSet) -> LlamaParser:
        """See `ToolFormat`."""
        return LlamaParser()

    def forced(self, tools: ToolSet, marks: Marks, template: str) -> str | None:
        """See `ToolFormat`."""
        return repeated("call", '"; "', tools.parallel) + call_object(tools, "parameters")
