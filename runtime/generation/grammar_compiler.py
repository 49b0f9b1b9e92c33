"""From the grammar of a request to a matcher, by llguidance (https://github.com/guidance-ai/llguidance).

llguidance rather than xgrammar: it needs nothing but the checkpoint's `tokenizer.json`, where xgrammar brings
transformers and triton. It is optional (`pip install pimoe[structured]`), and imported when it is first needed.

Grammars come from outside, so they are bounded in size, in llguidance's own measures of work, and in time. They
are compiled on one thread, whose stack is large: llguidance recurses, and a chain of a few thousand rules ends the
process on a stack of the usual 8 MiB.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import tokenizers

from ..errors import DeadlineExceededError, InvalidRequestError, OverloadedError
from ..requests import GrammarKind
from .grammar import GrammarMatcher, brief

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

R = TypeVar("R")

_STACK_BYTES = 256 << 20  # of address space; memory only where it is used
_END = "<|end of grammar|>"
# Otherwise a small model may write blanks for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
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
        max_bytes: of one grammar's text.
        compile_s: how long compiling one may take.
        max_compiled: compiled grammars that are kept, the last used ones.
        max_copies: requests that one compiled grammar serves before it is compiled anew; they share its memory.
        max_waiting: requests that wait for a grammar at once.
        max_states: of one compiled grammar's lexer; each takes 1 to 2 kB.
    """

    max_bytes: int = 64 << 10
    compile_s: float = 5.0
    max_compiled: int = 32
    max_copies: int = 256
    max_waiting: int = 64
    max_states: int = 20_000


class _Key(NamedTuple):
    kind: GrammarKind
    source: str


@dataclass(slots=True)
class _Compiled:
    matcher: LLMatcher
    copies: int = 0


class GrammarCompiler:
    """Compiles for one model. Its methods belong to one event loop.

    Args:
        folder: of the checkpoint, with `tokenizer.json`.
        vocab_size: of the model; its tokenizer may have fewer tokens.
        end_tokens: with any of them an answer may end where the grammar allows it.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        end_tokens: tuple[int, ...],
        limits: GrammarLimits | None = None,
    ) -> None:
        self.limits = limits or GrammarLimits()
        self._file = folder / "tokenizer.json"
        self._vocab_size, self._end_tokens = vocab_size, end_tokens
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer: LLTokenizer | None = None
        self._refusal: InvalidRequestError | None = None
        self._compiled: OrderedDict[_Key, _Compiled] = OrderedDict()
        self._waiting = 0

    def close(self) -> None:
        """Compile no more; what is under way ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def load(self) -> None:
        """Read the tokenizer, which takes 2 s for a vocabulary of 150,000; otherwise the first `compile` does it.

        Raises:
            InvalidRequestError: llguidance is not installed, or there is no tokenizer that it understands.
        """
        if self._tokenizer is None and self._refusal is None:
            await self._on_thread(self._load)
        if self._refusal is not None:
            # A new one each time: what is raised collects a traceback.
            raise InvalidRequestError(self._refusal.message, self._refusal.param)

    async def compile(self, kind: GrammarKind, source: str, deadline: float) -> GrammarMatcher:
        """A matcher for one request, at the beginning of its answer.

        Args:
            kind, source: `SamplingParams.grammar_kind` and `grammar`.
            deadline: on the event loop's clock.

        Raises:
            InvalidRequestError: structured output is not available here, or the grammar is not accepted.
            OverloadedError: too many grammars wait to be compiled.
            DeadlineExceededError.
        """
        key = _Key(kind, source)
        self._check_size(key)
        compiled = self._compiled.get(key)
        if compiled is None:
            if self._waiting >= self.limits.max_waiting:
                raise OverloadedError(
                    "too many requests wait for their grammars", "grammar", self.limits.compile_s
                )
            self._waiting += 1
            try:
                compiled = await self._compile_within(key, deadline)
            finally:
                self._waiting -= 1
        return self._copy(key, compiled)

    def _check_size(self, key: _Key) -> None:
        # Characters first: no need to encode a text that is far too long.
        size, limit = len(key.source), self.limits.max_bytes
        if size <= limit:
            size = len(key.source.encode("utf-8", "surrogatepass"))
        if size > limit:
            raise _refused(key.kind, f"it has {size} bytes; at most {limit} are allowed")

    async def _compile_within(self, key: _Key, deadline: float) -> _Compiled:
        clock = asyncio.get_running_loop().time
        started: list[float] = []
        try:
            async with asyncio.timeout_at(deadline):
                await self.load()
                async with asyncio.timeout(2 * self.limits.compile_s):
                    return await self._on_thread(partial(self._compile_once, key, started))
        except TimeoutError:
            if clock() >= deadline:
                raise DeadlineExceededError("the request's time ran out while its grammar was compiled") from None
            if started and time.monotonic() - started[0] >= self.limits.compile_s:
                raise _refused(key.kind, f"compiling it takes more than {self.limits.compile_s} s") from None
            message = "the grammars of other requests are being compiled"
            raise OverloadedError(message, "grammar", self.limits.compile_s) from None

    def _copy(self, key: _Key, compiled: _Compiled) -> GrammarMatcher:
        compiled.copies += 1
        self._compiled[key] = compiled
        self._compiled.move_to_end(key)
        if compiled.copies >= self.limits.max_copies:
            del self._compiled[key]
        elif len(self._compiled) > self.limits.max_compiled:
            self._compiled.popitem(last=False)
        assert self._tokenizer is not None
        size = self._tokenizer.vocab_size
        return GrammarMatcher(compiled.matcher.deep_copy(), self._vocab_size, size, partial(self._rebuild, key))

    def _rebuild(self, key: _Key) -> LLMatcher | None:
        """Compile again; the caller, in the middle of a step, waits. It was quick the first time."""
        self._compiled.pop(key, None)
        try:
            return self._submit(partial(self._compile_new, key)).result(self.limits.compile_s)
        except (InvalidRequestError, RuntimeError, TimeoutError):
            return None

    # On the thread.

    async def _on_thread(self, work: Callable[[], R]) -> R:
        return await asyncio.wrap_future(self._submit(work))

    def _submit(self, work: Callable[[], R]) -> Future[R]:
        usual = threading.stack_size(_STACK_BYTES)  # it holds for threads started from now on, which the first is
        try:
            return self._executor.submit(work)
        finally:
            threading.stack_size(usual)

    def _load(self) -> None:
        try:
            self._tokenizer = self._read_tokenizer()
        except InvalidRequestError as error:
            self._refusal = error

    def _read_tokenizer(self) -> LLTokenizer:
        try:
            import llguidance
        except ImportError as error:
            message = "structured output is not available here: pimoe[structured] is not installed"
            raise InvalidRequestError(message, "grammar") from error
        if not self._file.exists():
            message = "structured output needs the model's tokenizer.json, which is missing"
            raise InvalidRequestError(message, "grammar")
        try:
            backend = tokenizers.Tokenizer.from_file(str(self._file))
            backend.no_truncation()
            backend.no_padding()
            end_tokens = [token for token in self._end_tokens if backend.id_to_token(token) is not None]
            if not end_tokens:  # llguidance must have one; this one lies outside of the model's vocabulary
                backend.add_special_tokens([_END])
                end_tokens = [backend.get_vocab()[_END]]
            size = max(self._vocab_size, 1 + max(backend.get_vocab().values()))
            return llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=end_tokens)
        except Exception as error:  # both libraries raise plain Exception
            message = f"structured output cannot be had with this model's tokenizer: {brief(str(error))}"
            raise InvalidRequestError(message, "grammar") from error

    def _compile_once(self, key: _Key, started: list[float]) -> _Compiled:
        started.append(time.monotonic())
        # An equal request may have waited before this one.
        return self._compiled.get(key) or _Compiled(self._compile_new(key))

    def _compile_new(self, key: _Key) -> LLMatcher:
        from llguidance import LLMatcher

        assert self._tokenizer is not None
        try:
            grammar = _grammar_of(key)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._parser_limits())
            first = matcher.deep_copy()
            # Some show only here that they are too complex. What is not used further may be in any state.
            if not matcher.is_error():
                first.compute_bitmask()
            why = matcher.get_error() or first.get_error()
        except ValueError as error:
            why = str(error)
        if why:
            raise _refused(key.kind, brief(why))
        return matcher

    def _parser_limits(self) -> LLParserLimits:
        from llguidance import LLParserLimits

        return LLParserLimits(
            max_lexer_states=self.limits.max_states,
            initial_lexer_fuel=500_000,
            step_lexer_fuel=100_000,
            step_max_items=20_000,
            max_grammar_size=100_000,
            verbose_errors=False,
        )


def _grammar_of(key: _Key) -> str:
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


def _refused(kind: GrammarKind, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"the {_NAMES.get(kind, kind)} is not accepted: {why}", "grammar")
