"""One server at a time: started, waited for until it answers rightly, weighed, and ended with all of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pimoe.deployments.cluster import free_port
from pimoe.deployments.processes import descendants
from serving_contenders import Contender
from serving_model import Sample

_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 20.0
_ORPHANS_TIMEOUT_S = 3.0
_POLL_S = 0.02


class StartError(Exception):
    """A server did not come up; says what it printed last."""


@dataclass(frozen=True)
class Server:
    """One that runs.

    Attributes:
        start_s: from the start of its first process to its first right answer.
    """

    contender: Contender
    port: int
    pid: int
    start_s: float

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}{self.contender.path}"

    def memory_bytes(self) -> int:
        """Of all its processes: proportional set size, so that what they share counts once."""
        return sum(_pss_bytes(pid) for pid in (self.pid, *descendants(self.pid)))


@contextmanager
def running(contender: Contender, model: Path, sample: Sample) -> Iterator[Server]:
    """The server for the block, on a port of loopback.

    Raises:
        StartError, WrongAnswerError.
    """
    port = free_port()
    # What a cluster of this process was told (ports, files, HAProxy) is not for others.
    told = ("RAY_", "PIMOE_SOCKET_FOLDER")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    environment = {**inherited, **contender.variables(model, port)}
    with tempfile.TemporaryDirectory(prefix="serving-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                contender.command(model, port),
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_sigterm,
            )
        try:
            _wait_for_answer(process, contender, port, sample, log)
            yield Server(contender, port, process.pid, time.monotonic() - started)
        finally:
            _stop(process)


def ask(contender: Contender, port: int, body: bytes, timeout_s: float = 30.0) -> bytes:
    """One request on a connection of its own.

    Returns:
        The tensor bytes of the answer.

    Raises:
        OSError, http.client.HTTPException: no answer, or another status than 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request("POST", contender.path, body, dict(contender.headers))
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise http.client.HTTPException(f"status {response.status}: {content[:200]!r}")
        return contender.unwrap(content)


def _wait_for_answer(
    process: subprocess.Popen[bytes], contender: Contender, port: int, sample: Sample, log: Path
) -> None:
    until = time.monotonic() + _START_TIMEOUT_S
    last = "no answer"
    while process.poll() is None and time.monotonic() < until:
        try:
            sample.check(0, ask(contender, port, sample.bodies[0]))
        except (OSError, http.client.HTTPException) as error:
            last = str(error)
            time.sleep(_POLL_S)
        else:
            return
    ended = "" if process.poll() is None else f"; its process ended with {process.returncode}"
    printed = " ".join(log.read_text(errors="replace").split())[-300:]
    raise StartError(f"{last}{ended}; it printed: {printed or 'nothing'}")


def _heed_sigterm() -> None:
    """A supervised script ignores SIGTERM, and what it starts would too."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As a supervisor would: SIGTERM, patience, and SIGKILL for what is left of all that were there."""
    below = {pid: _born(pid) for pid in descendants(process.pid)}
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    process.kill()
    process.wait()
    patience = time.monotonic() + _ORPHANS_TIMEOUT_S
    while time.monotonic() < patience + _STOP_TIMEOUT_S:
        left = [pid for pid, born in below.items() if born is not None and _born(pid) == born]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if time.monotonic() > patience else signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # an orphan that came to this process
                os.waitpid(pid, os.WNOHANG)
        time.sleep(_POLL_S)


def _born(pid: int) -> str | None:
    """What tells a process from a later one with the same number; None when it has ended."""
    try:
        # The name, in parentheses, may hold anything; state and start time are the 1st and 20th after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" and int(fields[1]) != os.getpid() else fields[19]


def _pss_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass  # it ended while we looked
    return 0
