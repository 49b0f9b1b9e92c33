"""Closed-loop HTTP load by wrk: so many connections, each asking again as soon as it is answered.

wrk is a C program (Debian: `apt-get install wrk`), so that the generator takes little of the cores that it shares
with what it measures. `closed_loop.measure` runs it, or what takes its place where it is not installed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TIMEOUT_S = 30.0  # a request that takes longer is an error
ERRORS = ("connect", "read", "write", "status", "timeout")
_SLACK_S = 60.0  # to start, and to end what is under way
_REPORT = "wrk-report "


@dataclass(frozen=True)
class Target:
    """What is asked.

    Attributes:
        bodies: sent in turn by each connection's thread; with none, requests have no body.
    """

    url: str
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    bodies: Sequence[bytes] = ()


@dataclass(frozen=True)
class Load:
    """What came of it.

    Attributes:
        requests: answered, with whatever status.
        p50_us, p90_us, p99_us, max_us: from sending a request to its whole answer. wrk adds samples for requests
            that a slow answer kept it from sending (answers that took more than twice the mean).
        errors: by kind: connect, read, write, timeout; status: answers above 399.
        generator: "wrk" or "closed_loop.py".
    """

    requests: int
    seconds: float
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float
    errors: Mapping[str, int]
    generator: str = "wrk"

    @property
    def requests_per_s(self) -> float:
        """Answers with a good status."""
        return (self.requests - self.errors.get("status", 0)) / self.seconds

    @property
    def failed(self) -> int:
        """Of all kinds."""
        return sum(self.errors.values())

    def fault(self, most: float) -> str | None:
        """Why this is no measurement: nobody was answered well, or more than this share of requests failed."""
        asked = self.requests + self.failed - self.errors.get("status", 0)
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.errors.items() if count)
        if self.requests <= self.errors.get("status", 0):
            return f"answered nothing in {self.seconds:.1f} s" + (f" ({kinds})" if kinds else "")
        if self.failed > most * asked:
            return f"{self.failed:,} of {asked:,} requests failed ({kinds})"
        return None


class WrkError(Exception):
    """wrk ended without a report."""


def is_installed() -> bool:
    """Whether there is a wrk to run."""
    return shutil.which("wrk") is not None


def run(target: Target, connections: int, seconds: float, threads: int = 1, timeout_s: float = TIMEOUT_S) -> Load:
    """Let wrk ask `target` over so many connections for so long (whole seconds, at least one).

    Raises:
        WrkError: wrk is not installed, could not connect at all, or printed no report.
    """
    if not is_installed():
        raise WrkError("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="wrk-") as folder:
        script = _script(target, Path(folder))
        command = [
            "wrk",
            *("--threads", str(min(threads, connections)), "--connections", str(connections)),
            *("--duration", f"{max(1, round(seconds))}s", "--timeout", f"{max(1, round(timeout_s))}s"),
            *("--script", str(script), target.url),
        ]
        limit_s = seconds + timeout_s + _SLACK_S
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    return _parsed(done)


def _script(target: Target, folder: Path) -> Path:
    """Bodies are files, so that no byte of them needs escaping; requests are built before the load begins."""
    for index, body in enumerate(target.bodies):
        (folder / f"body-{index}").write_bytes(body)
    headers = "\n".join(f"wrk.headers[{_quoted(k)}] = {_quoted(v)}" for k, v in target.headers.items())
    script = folder / "load.lua"
    script.write_text(
        _LUA.format(
            method=_quoted(target.method), headers=headers, folder=_quoted(str(folder)), bodies=len(target.bodies)
        )
    )
    return script


_LUA = """
wrk.method = {method}
{headers}
local requests = {{}}
local turn = 0

function init(args)
  for index = 0, {bodies} - 1 do
    local file = assert(io.open({folder} .. "/body-" .. index, "rb"))
    requests[index + 1] = wrk.format(nil, nil, nil, file:read("*a"))
    file:close()
  end
  if #requests == 0 then requests[1] = wrk.format() end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  io.write("wrk-report {{",
    string.format('"requests": %d, "us": %d, ', summary.requests, summary.duration),
    string.format('"connect": %d, "read": %d, "write": %d, ', errors.connect, errors.read, errors.write),
    string.format('"status": %d, "timeout": %d, ', errors.status, errors.timeout),
    string.format('"p50": %d, "p90": %d, ', latency:percentile(50), latency:percentile(90)),
    string.format('"p99": %d, "max": %d', latency:percentile(99), latency.max), "}}\\n")
end
"""


def _quoted(text: str) -> str:
    """A string of Lua."""
    return '"' + "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03d}" for b in text.encode()) + '"'


def _parsed(done: subprocess.CompletedProcess[str]) -> Load:
    reports = [line.removeprefix(_REPORT) for line in done.stdout.splitlines() if line.startswith(_REPORT)]
    if done.returncode or not reports:
        raise WrkError(f"wrk exited with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    found: dict[str, int] = json.loads(reports[-1])
    return Load(
        requests=found["requests"],
        seconds=found["us"] / 1e6,
        p50_us=found["p50"],
        p90_us=found["p90"],
        p99_us=found["p99"],
        max_us=found["max"],
        errors={kind: found[kind] for kind in ERRORS},
    )
