"""What gpt-oss writes: messages in channels, with or without tools.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>

The channel `analysis` is reasoning, `final` is the answer, and so is what `commentary` says to nobody. A message
to a function that is no object is no call, and is given as it stands.
"""

from __future__ import annotations

import re

from ....runtime.generation.stopping import held_back
from .forced import Marks, ToolSet, call_by_name
from .parsing import Format, State, TextParser

_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_CONSTRAIN, _CALL, _END, _RETURN = "<|constrain|>", "<|call|>", "<|end|>", "<|return|>"
_ENDS = (_END, _CALL, _RETURN, _START, _CHANNEL)
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


class HarmonyParser(TextParser):
    """See the module."""

    starts = _ENDS

    def __init__(self) -> None:
        super().__init__()
        self.state: State = self._read_header
        self._give = self.say
        self._header = self._name = ""

    def _read_header(self) -> bool:
        header = self.take_until(_MESSAGE)
        if header is None:
            return False
        recipient = _RECIPIENT.search(header)
        if recipient:
            self._header, self._name = header + _MESSAGE, recipient[1]
            self.state = self._read_call
        else:
            thinks = header.rpartition(_CHANNEL)[2].strip().startswith("analysis")
            self._give = self.think if thinks else self.say
            self.state = self._read_message
        return True

    def _read_call(self) -> bool:
        """Where the arguments begin, if they do."""
        self.buffer = self.buffer.lstrip()
        if not self.buffer or held_back(self.buffer, _ENDS) == len(self.buffer):
            return False
        if self.buffer.startswith(("{", *_ENDS)):
            self.call(self._name)
            self._give = self.argue
            if self.buffer[0] != "{":
                self.argue("{}")
        else:
            self.say(self._header)
            self._give = self.say
        self.state = self._read_message
        return True

    def _read_message(self) -> bool:
        ends = [at for end in _ENDS if (at := self.buffer.find(end)) >= 0]
        if not ends:
            keep = held_back(self.buffer, _ENDS)
            self._give(self.buffer[: len(self.buffer) - keep])
            self.buffer = self.buffer[len(self.buffer) - keep :]
            return False
        self._give(self.buffer[: min(ends)])
        self.buffer = self.buffer[min(ends) :]
        self.state = self._read_header
        return True

    def break_off(self) -> None:
        """See `TextParser`."""
        if self.state == self._read_message:
            self._give(self.buffer)
        elif self.state == self._read_call:
            self.say(self._header + self.buffer)
        elif _CHANNEL not in self.buffer and not self.buffer.startswith((_END, _CALL, _RETURN, _START)):
            self.say(self.buffer)


class Harmony(Format):
    """See the module."""

    name = "harmony"
    special = (_CHANNEL, _MESSAGE, _START, _CONSTRAIN, _CALL, _END, _RETURN)
    always = True

    def matches(self, template: str) -> bool:
        """See `ToolFormat`."""
        return _CHANNEL in template and _MESSAGE in template

    def parser(self, tools: ToolSet) -> HarmonyParser:
        """See `ToolFormat`."""
        return HarmonyParser()

    def forced(self, tools: ToolSet, marks: Marks, template: str) -> str | None:
        """See `ToolFormat`. One call: the model's turn ends with it."""
        between = f'" " {marks(_CONSTRAIN)} "json" {marks(_MESSAGE)}'
        calls = call_by_name(tools, between, "commentary to=functions.")
        return f"start: {marks(_CHANNEL)} call\n{calls}"
