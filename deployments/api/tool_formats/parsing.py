"""What all formats of tool calls share: the parts of an answer, and a parser that reads text as it comes.

A parser gives the same parts however its text is cut, but for where the texts in them are cut; so a streamed
answer and a whole one agree. What looks like a call and is none stays text: nothing that a model said is lost. A
call that breaks off is given as far as it came, as OpenAI does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ....runtime.generation.stopping import first_stop, held_back
from .json_calls import CallReader, JsonSpan

# Looks at the buffer; False when there is too little text for it to go on.
State: TypeAlias = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Part:
    """The next part of an answer: text, reasoning, or something of a call.

    Attributes:
        call: which call of the answer, from 0; None where it is of none.
        name: of the called function, with a call's first part and no other.
        arguments: the next characters of the call's arguments, in JSON.
    """

    content: str = ""
    reasoning: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class Parser(Protocol):
    """Reads one answer."""

    def push(self, text: str) -> list[Part]:
        """What the text completes."""
        ...

    def finish(self) -> list[Part]:
        """What is left at the end."""
        ...


class Format:
    """What most formats agree in; see `ToolFormat`."""

    always = False

    def call_id(self, seed: str) -> str:
        """See `ToolFormat`."""
        return f"call_{seed[:24]}"


class TextParser:
    """A parser made of states, the first of which reads text up to one of `starts`, where a call begins.

    Attributes:
        buffer: text that is not used yet.
        state: what is to read it.
    """

    starts: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.buffer = ""
        self.state: State = self.read_content
        self._calls = 0
        self._after_call = False
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """See `Parser`."""
        self.buffer += text
        while self.state():
            pass
        return self._taken()

    def finish(self) -> list[Part]:
        """See `Parser`."""
        if self.state == self.read_content:
            self.say(self.buffer)
        else:
            self.break_off()
        self.buffer = ""
        return self._taken()

    def begin(self, start: str) -> State:
        """The state after that start."""
        raise NotImplementedError

    def break_off(self) -> None:
        """The answer has ended in another state than `read_content`."""

    def read_content(self) -> bool:
        """Text up to the start of a call. The space between them belongs to neither."""
        if (found := first_stop(self.buffer, self.starts)) is not None:
            at, start = found
            self.say(self.buffer[:at].rstrip())
            self.buffer = self.buffer[at + len(start) :]
            self.state = self.begin(start)
            return True
        certain = self.buffer[: len(self.buffer) - held_back(self.buffer, self.starts)].rstrip()
        self.buffer = self.buffer[len(certain) :]
        self.say(certain)
        return False

    def take_until(self, mark: str) -> str | None:
        """The buffer up to `mark`, which is dropped; None, and nothing taken, while there is none."""
        before, found, after = self.buffer.partition(mark)
        if not found:
            return None
        self.buffer = after
        return before

    def skip_until(self, mark: str, then: State) -> bool:
        """As a state: drops all up to and with `mark`."""
        if self.take_until(mark) is None:
            self.buffer = self.buffer[len(self.buffer) - held_back(self.buffer, (mark,)) :]
            return False
        self.state = then
        return True

    def read_object(self, call: CallReader, then: State) -> bool:
        """As a state: a call that is one JSON object. One that is none is text, and so is all that follows."""
        self.buffer = call.push(self.buffer)
        if call.failed and not call.announced:
            self.buffer = call.raw + self.buffer
            self.state = self.read_content
            return True
        if call.done or call.failed:
            self.state = then
        return bool(self.buffer)

    def read_arguments(self, span: JsonSpan, then: State) -> bool:
        """As a state: gives all up to the end of an object as the call's arguments."""
        count = span.push(self.buffer)
        self.argue(self.buffer[:count])
        self.buffer = self.buffer[count:]
        if span.done:
            self.state = then
        return bool(self.buffer)

    def say(self, text: str) -> None:
        """Gives text, without the space that follows a call."""
        text = text.lstrip() if self._after_call else text
        if text:
            self._after_call = False
            self._parts.append(Part(content=text))

    def think(self, text: str) -> None:
        """Gives reasoning."""
        if text:
            self._parts.append(Part(reasoning=text))

    def call(self, name: str) -> None:
        """Begins the next call."""
        self._parts.append(Part(call=self._calls, name=name))
        self._calls += 1
        self._after_call = True

    def argue(self, text: str) -> None:
        """Goes on with the arguments of the call."""
        if text:
            self._parts.append(Part(call=self._calls - 1, arguments=text))

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts
