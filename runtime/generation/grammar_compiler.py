"""From the grammar of a request to a matcher, by llguidance (https://github.com/guidance-ai/llguidance).

llguidance rather than xgrammar: it needs nothing but the checkpoint's `tokenizer.json`, where xgrammar brings
transformers and triton. It is optional (`pip install pimoe[structured]`), and imported when it is first needed.

Grammars come from outside, so they are bounded in size, in llguidance's own measures of work, and in time: each is
tried in another process first (`grammar_trial.py`), and compiled here only if that ended in time.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from ..daemon_threads import DaemonThreads
from ..errors import (
    DeadlineExceededError,
    OverloadedError,
    PimoeError,
    RequestCancelledError,
)
from ..requests import GrammarKind
from .grammar import GrammarMatcher
from .grammar_backend import STACK_BYTES, new_matcher, read_tokenizer
from .grammar_source import GrammarKey, GrammarLimits, check_size, refused
from .grammar_trial import GrammarTrials, TrialConfig

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class _Grammar:
    """A compiled grammar, and how many requests it serves or has served."""

    __slots__ = ("copies", "matcher")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher, self.copies = matcher, 0


class _Compiled:
    """The last used grammars. Any thread may use it."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self._grammars: OrderedDict[GrammarKey, _Grammar] = OrderedDict()

    def get(self, key: GrammarKey) -> _Grammar | None:
        with self._lock:
            if key in self._grammars:
                self._grammars.move_to_end(key)
            return self._grammars.get(key)

    def add(self, key: GrammarKey, grammar: _Grammar) -> None:
        with self._lock:
            self._grammars[key] = grammar
            if len(self._grammars) > self._limits.max_compiled:
                self._grammars.popitem(last=False)

    def copy(self, key: GrammarKey, grammar: _Grammar) -> LLMatcher:
        """For one more request; the last one that it may serve takes it out."""
        with self._lock:
            grammar.copies += 1
        if grammar.copies >= self._limits.max_copies:
            self.drop(key, grammar)
        return grammar.matcher.deep_copy()

    def drop(self, key: GrammarKey, grammar: _Grammar) -> bool:
        """It is not given out again; whether more than one request has drawn on it."""
        with self._lock:
            if self._grammars.get(key) is grammar:
                del self._grammars[key]
        return grammar.copies > 1


class _Verdicts:
    """What trials said of the last grammars: those accepted need no second one, and those refused get none for a
    while. Any thread may use it."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self._verdicts: OrderedDict[GrammarKey, tuple[str, float]] = OrderedDict()

    def get(self, key: GrammarKey) -> str | None:
        """Why it was refused, "" if it was accepted, None if that is not known."""
        with self._lock:
            why, at = self._verdicts.get(key, ("", -1.0))
            if at < 0 or (why and monotonic() - at > self._limits.refused_s):
                return None
            self._verdicts.move_to_end(key)
            return why

    def add(self, key: GrammarKey, why: str) -> None:
        with self._lock:
            self._verdicts[key] = why, monotonic()
            if len(self._verdicts) > 2 * self._limits.max_compiled:
                self._verdicts.popitem(last=False)


class _Job:
    """One compilation and how many requests wait for it. What fails is a value: each of them raises its own."""

    __slots__ = ("done", "future", "waiting")

    def __init__(self, future: Future[_Grammar | PimoeError]) -> None:
        self.future, self.waiting = future, 0
        self.done = asyncio.wrap_future(future)


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
        file = folder / "tokenizer.json"
        self._read = partial(read_tokenizer, file, vocab_size, end_tokens)
        self._vocab_size = vocab_size
        self._threads = DaemonThreads(self.limits.max_compiling, "grammars", STACK_BYTES)
        self._trials = GrammarTrials(TrialConfig(str(file), vocab_size, end_tokens, self.limits))
        self._loading: asyncio.Future[LLTokenizer] | None = None
        self._tokenizer: LLTokenizer | None = None
        self._compiled, self._verdicts = _Compiled(self.limits), _Verdicts(self.limits)
        self._jobs: dict[GrammarKey, _Job] = {}
        self._waiting = 0
        self._closed = False

    def close(self) -> None:
        """Compile no more, and end the processes that try grammars."""
        self._closed = True
        self._threads.close()
        self._trials.close()

    async def load(self) -> None:
        """Read the tokenizer, which takes 2 s for a vocabulary of 150,000; otherwise the first `compile` does it.

        Raises:
            InvalidRequestError: llguidance is not installed, or there is no tokenizer that it understands.
            RequestCancelledError: the compiler is closed.
        """
        if self._closed:
            raise RequestCancelledError("the server is shutting down")
        if self._loading is None:
            self._loading = asyncio.wrap_future(self._threads.submit(self._read))
        await asyncio.wait([self._loading])
        if self._loading.cancelled():
            raise RequestCancelledError("the server is shutting down")
        if isinstance(error := self._loading.exception(), PimoeError):
            raise _again(error)
        self._tokenizer = self._loading.result()

    async def compile(self, kind: GrammarKind, source: str, deadline: float) -> GrammarMatcher:
        """A matcher for one request, at the beginning of its answer.

        Args:
            kind, source: `SamplingParams.grammar_kind` and `grammar`.
            deadline: on the event loop's clock.

        Raises:
            InvalidRequestError: structured output is not available here, or the grammar is not accepted.
            OverloadedError: too many grammars wait to be compiled.
            UnavailableError: no process can be had to try the grammar in.
            DeadlineExceededError.
            RequestCancelledError: the compiler is closed.
        """
        key = GrammarKey(kind, source)
        check_size(key, self.limits)
        if why := self._verdicts.get(key):
            raise refused(kind, why)
        grammar = self._compiled.get(key)
        if grammar is None:
            if self._waiting >= self.limits.max_waiting:
                message = "too many requests wait for their grammars"
                raise OverloadedError(message, "grammar", self.limits.compile_s)
            self._waiting += 1
            try:
                grammar = await self._compile_within(key, deadline)
            finally:
                self._waiting -= 1
        assert self._tokenizer is not None
        matcher, size = self._compiled.copy(key, grammar), self._tokenizer.vocab_size
        return GrammarMatcher(matcher, self._vocab_size, size, partial(self._compiled.drop, key, grammar))

    async def _compile_within(self, key: GrammarKey, deadline: float) -> _Grammar:
        try:
            async with asyncio.timeout_at(deadline):
                await self.load()
                outcome = await self._outcome(key)
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out while its grammar was compiled") from None
        if isinstance(outcome, PimoeError):
            raise _again(outcome)
        return outcome

    async def _outcome(self, key: GrammarKey) -> _Grammar | PimoeError:
        """Wait for the compilation, with all who want the same one. It is taken back when none is left."""
        if key not in self._jobs:
            self._jobs[key] = _Job(self._threads.submit(partial(self._compile_tried, key)))
        job = self._jobs[key]
        job.waiting += 1
        try:
            await asyncio.wait([job.done], timeout=2 * self.limits.compile_s)
            if not job.future.running() and not job.future.done():
                message = "the grammars of other requests are being compiled"
                return OverloadedError(message, "grammar", self.limits.compile_s)
            await asyncio.wait([job.done])
            if job.done.cancelled():
                return RequestCancelledError("the server is shutting down")
            return job.done.result()
        finally:
            job.waiting -= 1
            if not job.waiting:
                job.future.cancel()
                del self._jobs[key]

    # On a thread.

    def _compile_tried(self, key: GrammarKey) -> _Grammar | PimoeError:
        try:
            if why := self._verdict(key):
                return refused(key.kind, why)
            grammar = _Grammar(self._compile_new(key))
        except PimoeError as error:
            return error
        self._compiled.add(key, grammar)
        return grammar

    def _verdict(self, key: GrammarKey) -> str:
        if key.kind == "json_object":
            return ""  # always the same, and ours
        if (why := self._verdicts.get(key)) is None:
            self._verdicts.add(key, why := self._trials.why_refused(key))
        return why

    def _compile_new(self, key: GrammarKey) -> LLMatcher:
        assert self._tokenizer is not None
        return new_matcher(self._tokenizer, key, self.limits)


def _again(error: PimoeError) -> PimoeError:
    # A new one each time: what is raised collects a traceback.
    return type(error)(error.message, error.param, error.retry_after_s)
