"""An event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest
from pimoe.runtime.errors import PimoeError, UnavailableError
from pimoe.runtime.loop_thread import LoopThread, new_event_loop

PATIENCE_S = 10.0


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    running = LoopThread("a test's loop")
    yield running
    running.close()
    assert not running._thread.is_alive()
    assert running.loop.is_closed()


async def name_of_thread() -> str:
    return threading.current_thread().name


async def fail(error: Exception) -> None:
    raise error


def test_coroutines_run_on_the_threads_own_loop(thread: LoopThread) -> None:
    assert thread.run(name_of_thread(), PATIENCE_S) == "a test's loop"
    assert thread.submit(name_of_thread()).result(PATIENCE_S) == "a test's loop"

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert thread.run(loop(), PATIENCE_S) is thread.loop


@pytest.mark.parametrize("error", [PimoeError("no"), ValueError("no"), TimeoutError("the coroutine's own")])
def test_errors_come_back_as_they_were_raised(thread: LoopThread, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        thread.run(fail(error), PATIENCE_S)
    assert str(raised.value) == str(error)
    thread.check()


def test_what_takes_too_long_is_cancelled(thread: LoopThread) -> None:
    cancelled = threading.Event()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError, match=r"a test's loop did not answer within 0\.02 s"):
        thread.run(never(), 0.02)
    assert cancelled.wait(PATIENCE_S)


def test_closing_cancels_what_runs_and_closes_generators() -> None:
    thread = LoopThread("closing")
    ended: list[str] = []
    started = threading.Event()
    generators = []

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            ended.append("generator")

    async def never() -> None:
        generators.append(numbers())
        await anext(generators[0])
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("task")

    future = thread.submit(never())
    assert started.wait(PATIENCE_S)
    thread.close()
    assert future.cancelled()
    assert ended == ["task", "generator"]
    with pytest.raises(UnavailableError, match="closing has ended"):
        thread.check()


@pytest.mark.filterwarnings("error")
def test_a_closed_thread_refuses_work_and_may_be_closed_again(recwarn: pytest.WarningsRecorder) -> None:
    thread = LoopThread("closed")
    thread.close()
    thread.close()
    with pytest.raises(UnavailableError):
        thread.run(name_of_thread(), PATIENCE_S)
    with pytest.raises(UnavailableError):
        thread.submit(name_of_thread())
    assert not recwarn.list  # of a coroutine that was never awaited


def test_a_thread_that_ended_by_itself_is_noticed_and_its_loop_closed() -> None:
    thread = LoopThread("dying")
    thread.loop.call_soon_threadsafe(thread.loop.stop)
    thread._thread.join(PATIENCE_S)
    with pytest.raises(UnavailableError):
        thread.check()
    thread.close()
    assert thread.loop.is_closed()


def test_closing_does_not_wait_for_ever_for_a_busy_loop() -> None:
    thread = LoopThread("busy")
    started, free = threading.Event(), threading.Event()

    async def compute() -> None:
        started.set()
        free.wait(PATIENCE_S)  # holds up its loop, as a long computation does

    thread.submit(compute())
    assert started.wait(PATIENCE_S)
    thread.check()  # busy is healthy
    thread.close(timeout_s=0.02)
    assert thread._thread.is_alive()
    free.set()
    thread._thread.join(PATIENCE_S)
    assert not thread._thread.is_alive()  # it ends as soon as it can
    thread.loop.run_until_complete(asyncio.sleep(0))
    thread.close()
    assert thread.loop.is_closed()


def test_a_new_loop_is_not_running() -> None:
    loop = new_event_loop()
    assert not loop.is_running()
    loop.close()
