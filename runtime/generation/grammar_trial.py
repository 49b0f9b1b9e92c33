"""Grammars tried in a process that can be killed: `python -m pimoe.runtime.generation.grammar_trial`.

Nothing ends a compilation of llguidance but its own end, which a JSON schema of 12 KB can put off for minutes,
and no measure of a grammar's text tells it. So the engine's process compiles only what has compiled here in time.

Its configuration comes as one line of JSON on standard input, then one line for each grammar; each is answered by
one line. It ends when standard input does, also in the middle of a grammar.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InvalidRequestError, RequestCancelledError, UnavailableError
from .grammar_backend import STACK_BYTES, blank_tokens, new_matcher, read_tokenizer, why_unusable
from .grammar_source import GrammarKey, GrammarLimits

_START_S = 60.0
_MAX_ANSWER_BYTES = 64 << 10
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class TrialConfig:
    """What the process is told: as `read_tokenizer` and `new_matcher` take it."""

    file: str
    vocab_size: int
    end_tokens: tuple[int, ...]
    limits: GrammarLimits


class GrammarTrials:
    """Tries grammars, each in one of the processes that it keeps; as many as are tried at once. Any thread may use
    it."""

    def __init__(self, config: TrialConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._idle: list[_TrialProcess] = []
        self._busy: set[_TrialProcess] = set()
        self._closed = False

    def why_refused(self, key: GrammarKey) -> str:
        """Compile a grammar elsewhere, waiting at most `compile_s` from when a process is up. Blocks.

        Returns:
            Why it is not accepted, for an `InvalidRequestError`; "" if it is.

        Raises:
            UnavailableError: there is no process to try it in.
            RequestCancelledError: these trials are closed.
        """
        process = self._take()
        try:
            process.wait_ready()
            why, sound = process.ask(key, self._config.limits.compile_s)
        except BaseException as error:
            self._give(process, sound=False)
            if self._closed and isinstance(error, UnavailableError):
                raise _closed() from None  # it was killed while it started
            raise
        self._give(process, sound)
        if self._closed:
            raise _closed()
        return why

    def close(self) -> None:
        """Kill the processes; what is being tried fails."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for process in self._busy:
                process.kill()
        for process in idle:
            process.close()

    def _take(self) -> _TrialProcess:
        with self._lock:
            if self._closed:
                raise _closed()
            process = self._idle.pop() if self._idle else _TrialProcess(self._config)
            self._busy.add(process)
            return process

    def _give(self, process: _TrialProcess, sound: bool) -> None:
        with self._lock:
            self._busy.discard(process)
            keep = sound and not self._closed
            if keep:
                self._idle.append(process)
        if keep:
            return
        process.close()
        with self._lock:
            if not self._closed and process.ready:
                # At once, so that the next grammar need not wait for it.
                with contextlib.suppress(UnavailableError):
                    self._idle.append(_TrialProcess(self._config))


class _TrialProcess:
    """The process, seen from the one thread that uses it. It is in a session of its own: Ctrl-C in a terminal is
    its parent's to handle."""

    def __init__(self, config: TrialConfig) -> None:
        command = [sys.executable, "-m", "pimoe.runtime.generation.grammar_trial"]
        # It finds our modules wherever this process did.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True, env=environment
            )
        except OSError as error:
            raise _unavailable(f"it cannot be started ({error.strerror})") from error
        self._received = b""
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self.ready = False
        with contextlib.suppress(BrokenPipeError):  # `wait_ready` tells
            self._send(asdict(config))

    def wait_ready(self) -> None:
        """Raises: UnavailableError: it does not come up."""
        if self.ready:
            return
        try:
            answer = self._receive(_START_S)
        except (EOFError, TimeoutError) as error:
            raise _unavailable("it does not start") from error
        if answer.get("error"):
            raise _unavailable(str(answer["error"]))
        self.ready = True

    def ask(self, key: GrammarKey, timeout_s: float) -> tuple[str, bool]:
        """Why the grammar is refused, or ""; and whether the process can be used further."""
        try:
            self._send({"kind": key.kind, "source": key.source})
            return str(self._receive(timeout_s)["error"]), True
        except TimeoutError:
            return f"compiling it takes more than {timeout_s:g} s", False
        except (EOFError, BrokenPipeError):
            return "the process that tried to compile it ended", False

    def kill(self) -> None:
        """From any thread."""
        self._process.kill()

    def close(self) -> None:
        """Kill it and wait until it is gone, which is at once."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()

    @property
    def _stdin(self) -> Any:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> Any:
        assert self._process.stdout is not None
        return self._process.stdout

    def _send(self, message: dict[str, Any]) -> None:
        # Its main thread does nothing but read, so this does not block while a grammar is compiled.
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[self._stdin.write(data) :]

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        """Raises: TimeoutError; EOFError: it has ended."""
        ends = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if not self._poll.poll(max(0.0, ends - time.monotonic()) * 1000):
                raise TimeoutError
            data = os.read(self._stdout.fileno(), _MAX_ANSWER_BYTES)
            if not data or len(self._received) > _MAX_ANSWER_BYTES:
                raise EOFError
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer


def _closed() -> RequestCancelledError:
    return RequestCancelledError("the server is shutting down")


def _unavailable(why: str) -> UnavailableError:
    return UnavailableError(f"no process to try grammars in: {why}", "grammar", _RETRY_AFTER_S)


# In the process.


def _try_all(config: TrialConfig, grammars: queue.SimpleQueue[bytes], parent: BinaryIO) -> None:
    try:
        tokenizer = read_tokenizer(Path(config.file), config.vocab_size, config.end_tokens)
    except InvalidRequestError as error:
        _say(parent, error.message)
        return
    blank = blank_tokens(tokenizer)
    _say(parent, "")
    while True:
        fields = json.loads(grammars.get())
        key = GrammarKey(fields["kind"], fields["source"])
        try:
            why = why_unusable(partial(new_matcher, tokenizer, key, config.limits), blank)
        except InvalidRequestError as error:
            why = error.message.split(" is not accepted: ", 1)[-1]
        _say(parent, why)


def _say(parent: BinaryIO, error: str) -> None:
    parent.write(json.dumps({"error": error}).encode() + b"\n")


def main() -> None:
    """Entry point of the process."""
    parent = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    fields = json.loads(sys.stdin.buffer.readline())
    limits, end_tokens = GrammarLimits(**fields.pop("limits")), tuple(fields.pop("end_tokens"))
    config = TrialConfig(**fields, limits=limits, end_tokens=end_tokens)
    grammars: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_try_all, args=(config, grammars, parent), daemon=True).start()
    for line in sys.stdin.buffer:
        grammars.put(line)
    os._exit(0)  # at once, whatever is being compiled


if __name__ == "__main__":
    main()
