"""An event loop in a thread of its own, for code that cannot await."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for any number of threads. The thread starts with the first one.

    A forked child has no copy of the thread: there every call raises, rather than wait for ever.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process: int | None = None
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns; the calling thread waits. An interrupt (Ctrl-C) cancels the coroutine.

        Raises:
            RuntimeError: closed, forked, or called from the loop's own thread, which would wait for itself.
        """
        try:
            future = self._submit(coroutine)
        except BaseException:
            coroutine.close()
            raise
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the client was closed while this call waited for its answer") from None
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Runs `callback` on the loop, without waiting for it; not at all where the loop has ended."""
        with self._lock:
            if self._loop is not None and not self._closed and self._process == os.getpid():
                self._loop.call_soon_threadsafe(callback)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancels what still runs, runs `last`, and ends the thread. Harmless when repeated."""
        if self._process not in (None, os.getpid()):
            _keep_for_ever(last)  # and what it belongs to
            return  # forked: neither the thread nor, for certain, an open lock came along
        with self._lock:
            loop, thread = self._loop, self._thread
            was_closed, self._closed = self._closed, True
        if was_closed or loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_end(loop, last), loop)
        if threading.current_thread() is not thread:  # the garbage collector may call from anywhere
            thread.join()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._process not in (None, os.getpid()):
            raise RuntimeError("this client was used before the process forked: make a new one in the child")
        with self._lock:
            if self._closed:
                raise RuntimeError("this client is closed")
            if threading.current_thread() is self._thread:
                raise RuntimeError("a blocking call from the client's own thread would wait for itself")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop or self._start())

    def _start(self) -> asyncio.AbstractEventLoop:
        self._loop = loop = asyncio.new_event_loop()
        self._process = os.getpid()
        # A daemon, so that a client which nobody closed does not keep the interpreter from ending.
        self._thread = threading.Thread(target=_serve, args=(loop,), name=self._name, daemon=True)
        self._thread.start()
        return loop


def _keep_for_ever(value: object) -> None:
    """Takes a reference that nobody gives back.

    A forked child shares the sockets and the kernel's epoll object with its parent. Were the connections that it
    inherited ever collected, they would close themselves, and so make the parent deaf to its own.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _end(loop: asyncio.AbstractEventLoop, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last()
        await asyncio.sleep(0)  # connections tell that they are closed in the loop's next turn
    finally:
        loop.stop()
