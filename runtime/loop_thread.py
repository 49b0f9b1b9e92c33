"""An event loop in a thread of its own.

Serve answers health checks on its own loop; computing happens on this one, so that a long batch never looks like a
dead replica.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from .errors import UnavailableError

R = TypeVar("R")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: its sockets cost half of asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class LoopThread:
    """Runs coroutines of other threads on its own loop. `close` it."""

    def __init__(self, name: str) -> None:
        self.loop = new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        """Start a coroutine on the loop, from any thread.

        Raises:
            UnavailableError: the thread has ended.
        """
        try:
            self.check()
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except BaseException:
            coroutine.close()  # else it is reported as one that was never awaited
            raise

    def run(self, coroutine: Coroutine[Any, Any, R], timeout_s: float) -> R:
        """Run a coroutine on the loop and wait for it, from another thread.

        Raises:
            TimeoutError: it took longer than `timeout_s`; it is cancelled.
            UnavailableError: the thread has ended.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():
                raise  # the coroutine's own
            future.cancel()
            raise TimeoutError(f"{self._thread.name} did not answer within {timeout_s} s") from None

    def check(self) -> None:
        """Whether the thread lives. A busy loop is healthy: only a dead one is not.

        Raises:
            UnavailableError: it is dead.
        """
        if not self._thread.is_alive():
            raise UnavailableError(f"the thread {self._thread.name} has ended")

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancel everything on the loop and end the thread; what has not ended after `timeout_s` is left."""
        if self._thread.is_alive():
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(timeout_s)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
