"""How models write tool calls: one module per format, recognised by what the checkpoint's chat template says.

A new format is a class with the methods of `ToolFormat` and a line in `FORMATS`. The first that matches counts, so
the more particular ones come first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from .deepseek import DeepSeek
from .forced import Marks, ToolSet
from .harmony import Harmony
from .hermes import Hermes
from .llama import Llama
from .mistral import Mistral
from .parsing import Parser, Part
from .qwen_coder import QwenCoder

__all__ = ["FORMATS", "Marks", "Parser", "Part", "ToolFormat", "ToolSet", "format_of"]


class ToolFormat(Protocol):
    """One format.

    Attributes:
        name: for errors.
        special: marks that may be special tokens, whose text the parser needs nevertheless.
        always: answers are in this format without tools too.
    """

    @property
    def name(self) -> str: ...

    @property
    def special(self) -> tuple[str, ...]: ...

    @property
    def always(self) -> bool: ...

    def matches(self, template: str) -> bool:
        """Whether a chat template speaks it."""
        ...

    def parser(self, tools: ToolSet) -> Parser:
        """For one answer."""
        ...

    def call_id(self, seed: str) -> str:
        """A call's id out of a seed of 32 hexadecimal digits, in the form that the template accepts."""
        ...

    def forced(self, tools: ToolSet, marks: Marks, template: str) -> str | None:
        """A grammar, in Lark's notation, of answers that call one of `tools.forced`; None: there is none."""
        ...


FORMATS: tuple[ToolFormat, ...] = (Harmony(), DeepSeek(), Mistral(), QwenCoder(), Hermes(), Llama())


@lru_cache(maxsize=16)
def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template speaks; None: none of ours."""
    return next((format for format in FORMATS if format.matches(template)), None)
