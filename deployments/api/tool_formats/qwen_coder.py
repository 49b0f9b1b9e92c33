"""The calls of Qwen3-Coder, whose values are text between tags:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A value is a string where the function's schema says so or JSON does not know it. A call is given when it is whole,
since its arguments are no JSON before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import orjson

from .forced import Marks, ToolSet, quoted
from .parsing import Format, State, TextParser

_START, _END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\s]+)\s*>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)\s*>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


class QwenCoderParser(TextParser):
    """See the module."""

    starts = (_START,)

    def __init__(self, tools: ToolSet) -> None:
        super().__init__()
        self._tools = tools

    def begin(self, start: str) -> State:
        """See `TextParser`."""
        return self._read_call

    def _read_call(self) -> bool:
        block = self.take_until(_END)
        if block is None:
            return False
        self.state = self.read_content
        found = _FUNCTION.search(block)
        if found is None:
            self.say(_START + block + _END)
        else:
            self.call(found[1])
            self.argue(self._arguments(found[1], found[2]))
        return True

    def _arguments(self, name: str, body: str) -> str:
        properties = self._tools.schema(name).get("properties")
        known = properties if isinstance(properties, Mapping) else {}
        values = {key: _value(text, known.get(key)) for key, text in _PARAMETER.findall(body)}
        return "{" + ",".join(f"{quoted(key)}:{value}" for key, value in values.items()) + "}"

    def break_off(self) -> None:
        """See `TextParser`."""
        self.say(_START + self.buffer)


def _value(text: str, schema: object) -> str:
    """In JSON."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return quoted(text)
    try:
        return orjson.dumps(orjson.loads(text)).decode()
    except (orjson.JSONDecodeError, TypeError):  # no JSON, or nested too deeply to be written again
        return quoted(text)


class QwenCoder(Format):
    """See the module."""

    name = "qwen3-coder"
    special = (_START, _END)

    def matches(self, template: str) -> bool:
        """See `ToolFormat`."""
        return "<function=" in template and "<parameter=" in template

    def parser(self, tools: ToolSet) -> QwenCoderParser:
        """See `ToolFormat`."""
        return QwenCoderParser(tools)

    def forced(self, tools: ToolSet, marks: Marks, template: str) -> str | None:
        """None: a JSON schema says nothing of such text."""
        return None
