"""Closed loops: so many connections, each of which asks again as soon as it was answered. wrk where it is there,
otherwise a slower one of our own, which takes more of the cores that the server wants."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report import quantile
from serving_client import Connection, run

SCRIPT = Path(__file__).with_suffix(".lua")
MISSING = "wrk is not installed (Debian: apt-get install wrk); the closed loop is our own, in Python"


@dataclass(frozen=True)
class ClosedLoop:
    """What came of one.

    Attributes:
        requests_per_s: answered with 200.
        errors: other statuses, broken connections and timeouts.
    """

    requests_per_s: float
    p50_s: float
    p99_s: float
    errors: int


def find_wrk() -> str | None:
    """Its path."""
    return shutil.which("wrk")


def with_wrk(
    wrk: str,
    url: str,
    headers: Sequence[tuple[str, str]],
    bodies: Sequence[bytes],
    file: Path,
    load: tuple[int, int],
) -> ClosedLoop:
    """One run.

    Args:
        bodies: of one length; each request takes the next.
        file: where wrk finds them; written here.
        load: connections and whole seconds.

    Raises:
        RuntimeError: wrk failed; says what it printed.
    """
    connections, seconds = load
    file.write_bytes(b"".join(bodies))
    given = [part for name, value in headers for part in ("-H", f"{name}: {value}")]
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(SCRIPT), *given, url]
    environment = {**os.environ, "SERVING_BODIES": str(file), "SERVING_BODY_BYTES": str(len(bodies[0]))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 60)
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not result:
        raise RuntimeError(f"wrk failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return parse(result[0])


def parse(line: str) -> ClosedLoop:
    """The line that the script prints: time, requests, wrong statuses, broken, p50 and p99; times in us."""
    duration_us, requests, statuses, broken, p50_us, p99_us = map(int, line.split()[1:])
    answered = max(0, requests - statuses)
    return ClosedLoop(1e6 * answered / max(1, duration_us), p50_us / 1e6, p99_us / 1e6, statuses + broken)


def without_wrk(port: int, requests: Sequence[bytes], load: tuple[int, int]) -> ClosedLoop:
    """The same from Python.

    Args:
        requests: as `serving_client.request_bytes` makes them; each takes the next.
        load: connections and seconds.
    """
    connections, seconds = load
    found: ClosedLoop = run(lambda: _closed(port, requests, connections, seconds))
    return found


async def _closed(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> ClosedLoop:
    latencies: list[float] = []
    errors = turn = 0
    started = time.monotonic()
    until = started + seconds

    async def caller() -> None:
        nonlocal errors, turn
        connection: Connection | None = None
        while time.monotonic() < until:
            request = requests[turn % len(requests)]
            turn += 1
            asked = time.monotonic()
            try:
                async with asyncio.timeout(10):
                    if connection is None or not connection.is_open:
                        connection = await Connection.connect(port)
                    answer = await connection.ask(request)
            except (OSError, TimeoutError):
                errors += 1
                if connection is not None:
                    connection.close()
                await asyncio.sleep(0.01)  # not as fast as a broken server refuses
                continue
            if answer.status == 200:
                latencies.append(time.monotonic() - asked)
            else:
                errors += 1
        if connection is not None:
            connection.close()

    await asyncio.gather(*(caller() for _ in range(connections)))
    elapsed_s = time.monotonic() - started
    p50_s, p99_s = (quantile(latencies, share) if latencies else 0.0 for share in (0.5, 0.99))
    return ClosedLoop(len(latencies) / elapsed_s, p50_s, p99_s, errors)
