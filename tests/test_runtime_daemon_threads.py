"""Threads that hold up nobody's end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
from pimoe.runtime.daemon_threads import DaemonThreads


@pytest.fixture
def threads() -> Iterator[DaemonThreads]:
    made = DaemonThreads(2, "test")
    yield made
    made.close()


def test_results_and_errors_are_those_of_the_work(threads: DaemonThreads) -> None:
    assert threads.submit(lambda: 3).result(60) == 3
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(60)
    assert threads.submit(lambda: 4).result(60) == 4


def test_so_many_work_at_once_and_the_rest_waits(threads: DaemonThreads) -> None:
    go, together = threading.Event(), threading.Barrier(3)

    def work() -> str:
        together.wait(60)
        assert go.wait(60)
        return threading.current_thread().name

    first = [threads.submit(work) for _ in range(2)]
    third = threads.submit(lambda: "third")
    together.wait(60)
    assert not third.running()
    assert third.cancel()
    go.set()
    assert {future.result(60) for future in first} == {"test-0", "test-1"}


def test_closing_cancels_what_has_not_begun(threads: DaemonThreads) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)

    def work() -> int:
        begun.release()
        assert go.wait(60)
        return 1

    first = [threads.submit(work) for _ in range(2)]
    waiting = threads.submit(lambda: 2)
    for _ in first:
        assert begun.acquire(timeout=60)
    threads.close()
    go.set()
    assert [future.result(60) for future in first] == [1, 1]
    for future in (waiting, threads.submit(lambda: 3)):
        with pytest.raises(CancelledError):
            future.result(60)


def test_the_stack_is_as_large_as_was_asked_for() -> None:
    script = textwrap.dedent("""
        import json, sys
        from pimoe.runtime.daemon_threads import DaemonThreads

        sys.setrecursionlimit(10**9)
        threads = DaemonThreads(1, "deep", 256 << 20)
        deep = lambda depth: max(map(deep, [depth - 1])) if depth else 0  # each takes C stack
        print(threads.submit(lambda: deep(60_000)).result())
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "0\n", (done.returncode, done.stderr)


def test_the_interpreter_does_not_wait_for_them() -> None:
    script = textwrap.dedent("""
        import threading
        from pimoe.runtime.daemon_threads import DaemonThreads

        begun = threading.Event()
        DaemonThreads(1, "endless").submit(lambda: (begun.set(), threading.Event().wait()))
        begun.wait()
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
