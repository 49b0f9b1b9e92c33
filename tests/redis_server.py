"""A real Redis or Valkey for tests: on a Unix socket of its own, without persistence, to be killed and stopped."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")

_PATIENCE_S = 30.0  # only ever spent by a test that fails


class RedisServer:
    """A server that listens at `url`; what it holds is gone when it is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert BINARY is not None
        options = {"port": 0, "unixsocket": self.socket, "save": "", "appendonly": "no", "dir": self.folder}
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        log = (self.folder / "redis.log").open("ab")
        self._process = subprocess.Popen([BINARY, *arguments], stdout=log, stderr=log)
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                with self.raw() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                assert time.monotonic() < until, (self.folder / "redis.log").read_text()
                time.sleep(0.01)

    def kill(self) -> None:
        """End it in mid-use."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def raw(self) -> redis.Redis:
        """A client of the test's own."""
        return redis.Redis(unix_socket_path=str(self.socket), protocol=2)

    def entries(self) -> list[str]:
        """The names of the entries that it holds."""
        with self.raw() as client:
            return sorted(name.decode() for name in client.keys("*:e:*"))

    def everything(self) -> dict[bytes, bytes]:
        """All names and strings that it holds."""
        with self.raw() as client:
            names: list[bytes] = list(client.scan_iter())
            return {name: client.get(name) or b"" for name in names}

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own."""
    if BINARY is None:
        pytest.skip("neither redis-server nor valkey-server is in PATH")
    server = RedisServer(tmp_path)
    yield server
    server.resume()
    server.kill()
