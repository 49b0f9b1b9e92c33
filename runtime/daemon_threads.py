"""Threads for blocking work that must never hold up the interpreter's exit.

A `ThreadPoolExecutor` joins its threads there: one that is in a long call of a library keeps the process alive.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

R = TypeVar("R")

_starting = threading.Lock()  # the stack size is one setting for the whole process


class DaemonThreads:
    """At most `count` threads, started when there is work. Any thread may use it; callers bound what waits.

    Args:
        stack_bytes: of each thread, of address space; 0 for the usual.
    """

    def __init__(self, count: int, name: str, stack_bytes: int = 0) -> None:
        self._count, self._name, self._stack_bytes = count, name, stack_bytes
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """Do `work` when a thread is free, in the order of submission; cancel the future to take it back. After
        `close` it is cancelled already."""
        future: Future[R] = Future()
        if self._closed:
            future.cancel()
            return future
        self._work.put((future, work))
        if len(self._threads) < self._count:
            self._start()
        return future

    def close(self) -> None:
        """Cancel what has not begun; what has ends by itself."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                if (item := self._work.get_nowait()) is not None:
                    item[0].cancel()
        for _ in self._threads:
            self._work.put(None)

    def _start(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        with _starting:
            usual = threading.stack_size(self._stack_bytes)
            try:
                thread.start()
            finally:
                threading.stack_size(usual)
        self._threads.append(thread)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            _complete(*item)
            del item  # what the work holds must not live until the next comes


def _complete(future: Future[R], work: Callable[[], R]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # whoever waits is told
        future.set_exception(error)
    else:
        future.set_result(result)
