"""That nothing is left behind: signals become exceptions, and what outlives its parents is ended by us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOP_TIMEOUT_S = 60.0
_REMIND_S = 2.0


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parents die (Linux), so that `end_descendants` finds HAProxy and
    Ray's workers however Ray ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def supervise(work: Callable[[], int]) -> int:
    """Run `work` in a child process, turn signals into `KeyboardInterrupt` there, and end whatever of it is
    left when it has ended.

    Interrupting Ray in the middle of its start can crash the process that it happens to; this one has no Ray in
    it, so it is always there to clean up. Call it before anything starts threads.

    Returns:
        The exit code: of `work`, 130 when a signal ended it.
    """
    adopt_orphans()
    interrupted_at: list[float] = []

    def remember(number: int, frame: FrameType | None) -> None:
        interrupted_at.append(time.monotonic())

    for number in _stop_signals():
        signal.signal(number, remember)
    child = os.fork()
    if child == 0:
        _await_interrupts()
        os._exit(_exit_code(work))
    code = _wait(child, interrupted_at)
    ignore_signals()
    end_descendants()
    return 130 if interrupted_at else code


def _stop_signals() -> list[signal.Signals]:
    """What ends a command: SIGHUP too, when its terminal closes, unless it was started by nohup."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


def _await_interrupts() -> None:
    """In the child: SIGINT, which the supervisor sends, raises `KeyboardInterrupt`, also where a shell without job
    control had it ignored; and it comes by itself should the supervisor be killed."""
    for number in _stop_signals():
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT.value, 0, 0, 0)


def _exit_code(work: Callable[[], int]) -> int:
    """What `work` ends with. Nothing may escape: the child would go on with its parent's code."""
    try:
        return work()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(child: int, interrupted_at: list[float]) -> int:
    """The child's exit code. Once interrupted, it is too; again and again, since an exception that comes up inside
    some library's callback is lost; and killed when it does not end in time."""
    sent_at = 0.0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if interrupted_at and now > sent_at + _REMIND_S:
            sent_at = now
            is_late = now > interrupted_at[0] + _STOP_TIMEOUT_S
            os.kill(child, signal.SIGKILL if is_late else signal.SIGINT)
        time.sleep(0.02)


def ignore_signals() -> None:
    """From here on only SIGKILL ends this process early."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents first (Linux)."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _parent(int(entry))) is not None:
            children.setdefault(parent, []).append(int(entry))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name, in parentheses, may hold anything; the parent is the second field after it.
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None  # it ended while we looked


def end_descendants(grace_s: float = 3.0) -> None:
    """End every process below this one, kindly at first, and wait until they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        until = time.monotonic() + grace_s
        while _reap() and descendants(os.getpid()) and time.monotonic() < until:
            time.sleep(0.02)


def _reap() -> bool:
    """Collect ended children; whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
