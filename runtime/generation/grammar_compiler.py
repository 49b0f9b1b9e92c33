"""From the grammar of a request to a matcher, by llguidance (https://github.com/guidance-ai/llguidance).

llguidance rather than xgrammar: it needs nothing but the checkpoint's `tokenizer.json`, where xgrammar brings
transformers and triton. It is optional (`pip install pimoe[structured]`), and imported when it is first needed.

Grammars come from outside, so they are bounded in size, in llguidance's own measures of work, and in time. They
are compiled on one thread, whose stack is large: llguidance recurses, and a chain of a few thousand rules ends the
process on a stack of the usual 8 MiB.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tokenizers

from ..errors import DeadlineExceededError, InvalidRequestError, OverloadedError, RequestCancelledError
from ..requests import GrammarKind
from .grammar import GrammarMatcher, brief
from .grammar_source import GrammarKey, GrammarLimits, check_size, grammar_of, parser_limits, refused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

R = TypeVar("R")

_STACK_BYTES = 256 << 20  # of address space; memory only where it is used
_END = "<|end of grammar|>"


class _Compiled:
    """The last used grammars, with how often each may still be copied. Any thread may use it."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self._matchers: OrderedDict[GrammarKey, tuple[LLMatcher, int]] = OrderedDict()

    def copy(self, key: GrammarKey) -> LLMatcher | None:
        with self._lock:
            if key not in self._matchers:
                return None
            matcher, copies = self._matchers.pop(key)
            if copies > 1:
                self._matchers[key] = matcher, copies - 1
            return matcher.deep_copy()

    def add(self, key: GrammarKey, matcher: LLMatcher) -> None:
        with self._lock:
            self._matchers[key] = matcher, self._limits.max_copies
            if len(self._matchers) > self._limits.max_compiled:
                self._matchers.popitem(last=False)

    def drop(self, key: GrammarKey) -> None:
        with self._lock:
            self._matchers.pop(key, None)


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
        self._compiled = _Compiled(self.limits)
        self._waiting = 0
        self._closed = False

    def close(self) -> None:
        """Compile no more; what is under way ends by itself."""
        self._closed = True
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
            RequestCancelledError: the compiler is closed.
        """
        key = GrammarKey(kind, source)
        check_size(key, self.limits)
        matcher = self._compiled.copy(key)
        if matcher is None:
            if self._waiting >= self.limits.max_waiting:
                message = "too many requests wait for their grammars"
                raise OverloadedError(message, "grammar", self.limits.compile_s)
            self._waiting += 1
            try:
                matcher = await self._compile_within(key, deadline)
            finally:
                self._waiting -= 1
        assert self._tokenizer is not None
        size = self._tokenizer.vocab_size
        return GrammarMatcher(matcher, self._vocab_size, size, partial(self._rebuild, key))

    async def _compile_within(self, key: GrammarKey, deadline: float) -> LLMatcher:
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
                raise refused(key.kind, f"compiling it takes more than {self.limits.compile_s} s") from None
            message = "the grammars of other requests are being compiled"
            raise OverloadedError(message, "grammar", self.limits.compile_s) from None

    def _rebuild(self, key: GrammarKey) -> LLMatcher | None:
        """Compile again; the caller, in the middle of a step, waits. It was quick the first time."""
        self._compiled.drop(key)
        try:
            return self._submit(partial(self._compile_new, key)).result(self.limits.compile_s)
        except (InvalidRequestError, RuntimeError, TimeoutError):
            return None

    # On the thread.

    async def _on_thread(self, work: Callable[[], R]) -> R:
        if self._closed:
            raise RequestCancelledError("the server is shutting down")
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

    def _compile_once(self, key: GrammarKey, started: list[float]) -> LLMatcher:
        started.append(time.monotonic())
        # An equal request may have waited before this one.
        if (copy := self._compiled.copy(key)) is None:
            self._compiled.add(key, self._compile_new(key))
            copy = self._compiled.copy(key)
            assert copy is not None
        return copy

    def _compile_new(self, key: GrammarKey) -> LLMatcher:
        from llguidance import LLMatcher

        assert self._tokenizer is not None
        try:
            grammar = grammar_of(key)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits(self.limits))
            first = matcher.deep_copy()
            # Some show only here that they are too complex. What is not used further may be in any state.
            if not matcher.is_error():
                first.compute_bitmask()
            why = matcher.get_error() or first.get_error()
        except ValueError as error:
            why = str(error)
        if why:
            raise refused(key.kind, brief(why))
        return matcher
