"""Grammars as requests bring them: their bounds, and how they read in llguidance's notation."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigurationError, InvalidRequestError
from ..requests import GrammarKind

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# Otherwise a small model may write blanks for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_MAX_MESSAGE_CHARS = 300
_NAMES: dict[GrammarKind, str] = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "choice": "list of choices",
    "lark": "Lark grammar",
}


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Bounds of grammars.

    Attributes:
        max_schema_bytes: of a JSON schema's text.
        max_grammar_bytes: of any other grammar's text; llguidance takes quadratic time for some.
        compile_s: how long compiling one may take.
        max_compiling: grammars that are compiled at once; each is first tried in a process of its own.
        max_compiled: compiled grammars that are kept, the last used ones.
        max_copies: requests that one compiled grammar serves before it is compiled anew; they share its memory.
        refused_s: for so long a refused grammar is refused again without a look.
        max_waiting: requests that wait for a grammar at once.
        max_states: of one compiled grammar's lexer; each takes 1 to 2 kB.
    """

    max_schema_bytes: int = 64 << 10
    max_grammar_bytes: int = 16 << 10
    compile_s: float = 5.0
    max_compiling: int = 2
    max_compiled: int = 32
    max_copies: int = 64
    refused_s: float = 60.0
    max_waiting: int = 64
    max_states: int = 20_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigurationError(f"grammars.{field.name} is {value}; it must be above 0", field.name)


class GrammarKey(NamedTuple):
    """`SamplingParams.grammar_kind` and `grammar`."""

    kind: GrammarKind
    source: str


def check_size(key: GrammarKey, limits: GrammarLimits) -> None:
    """Refuse what is too long even to be looked at.

    Raises:
        InvalidRequestError.
    """
    # Characters first: no need to encode a text that is far too long.
    size = len(key.source)
    limit = limits.max_schema_bytes if key.kind == "json_schema" else limits.max_grammar_bytes
    if size <= limit:
        size = len(key.source.encode("utf-8", "surrogatepass"))
    if size > limit:
        raise refused(key.kind, f"it has {size} bytes; at most {limit} are allowed")


def parser_limits(limits: GrammarLimits) -> LLParserLimits:
    """In llguidance's measures of work; these allow all that is usual."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=limits.max_states,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def grammar_of(key: GrammarKey) -> str:
    """In llguidance's own notation.

    Raises:
        ValueError: `source` is not even JSON where it must be.
    """
    from llguidance import LLMatcher

    if key.kind == "regex":
        return LLMatcher.grammar_from_regex(key.source)
    if key.kind == "lark":
        return LLMatcher.grammar_from_lark(key.source)
    if key.kind == "choice":
        return LLMatcher.grammar_from_lark(_lark_of_choices(key.source))
    schema = '{"type": "object"}' if key.kind == "json_object" else key.source
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})


def _lark_of_choices(source: str) -> str:
    try:
        choices = json.loads(source)
    except RecursionError:
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("it must be a JSON list of strings that is not empty")
    # Lark's strings are those of JSON, but for pairs of surrogates.
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def refused(kind: GrammarKind, why: str) -> InvalidRequestError:
    """The error for a grammar that is not accepted."""
    return InvalidRequestError(f"the {_NAMES.get(kind, kind)} is not accepted: {why}", "grammar")


def brief(message: str) -> str:
    """What llguidance says, without its dump of the state, at a length for an error message."""
    told = " ".join(message.replace("<non-verbose/>", "").split("\n<state>")[0].split())
    return told if len(told) <= _MAX_MESSAGE_CHARS else told[:_MAX_MESSAGE_CHARS] + " ..."
