"""The calls of DeepSeek-V3 and R1, and of V3.1:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
```json
{...}
```<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>
"""

from __future__ import annotations

from .forced import Marks, ToolSet, call_by_name
from .json_calls import JsonSpan
from .parsing import Format, State, TextParser

_ALL, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_ONE, _SEP, _ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_KIND = "function"


class DeepSeekParser(TextParser):
    """See the module."""

    starts = (_ALL, _ONE, _ALL_END)

    def begin(self, start: str) -> State:
        """See `TextParser`."""
        return self._read_name if start == _ONE else self.read_content

    def _read_name(self) -> bool:
        at, end = self.buffer.find("{"), self.buffer.find(_ONE_END)
        if end >= 0 and (at < 0 or end < at):  # there are no arguments, or they are something else
            at = end + len(_ONE_END)
        if at < 0:
            return False
        head, self.buffer = self.buffer[:at], self.buffer[at:]
        name = _name(head)
        if name:
            self.call(name)
            self._span = JsonSpan()
            self.state = self._read_arguments
        else:
            self.say(_ONE + head)
            self.state = self.read_content
        return True

    def _read_arguments(self) -> bool:
        return self.read_arguments(self._span, self._read_end)

    def _read_end(self) -> bool:
        return self.skip_until(_ONE_END, self.read_content)

    def break_off(self) -> None:
        """See `TextParser`."""
        if self.state == self._read_name:
            self.say(_ONE + self.buffer)


def _name(head: str) -> str:
    """The function's name in what stands before its arguments; empty where there stands anything else."""
    kind, found, rest = head.partition(_SEP)
    if not found:
        return ""
    name, _, rest = rest.strip().partition("\n") if kind.strip() == _KIND else (kind.strip(), "", rest)
    return name.strip() if rest.strip() in ("", "```json") else ""


class DeepSeek(Format):
    """See the module."""

    name = "deepseek"
    special = (_ALL, _ALL_END, _ONE, _SEP, _ONE_END)

    def matches(self, template: str) -> bool:
        """See `ToolFormat`."""
        return _ONE in template

    def parser(self, tools: ToolSet) -> DeepSeekParser:
        """See `ToolFormat`."""
        return DeepSeekParser()

    def forced(self, tools: ToolSet, marks: Marks, template: str) -> str | None:
        """See `ToolFormat`."""
        more = " one*" if tools.parallel else ""
        start = f"start: {marks(_ALL)} one{more} {marks(_ALL_END)}\n"
        if "```json" not in template:
            return start + f"one: {marks(_ONE)} call {marks(_ONE_END)}\n" + call_by_name(tools, marks(_SEP))
        one = f'one: {marks(_ONE)} "{_KIND}" {marks(_SEP)} call "\\n```" {marks(_ONE_END)}\n'
        return start + one + call_by_name(tools, '"\\n```json\\n"')
