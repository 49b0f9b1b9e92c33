"""One expert group as a local process: `python -m pimoe.runtime.experts.process`.

Its configuration comes as one line of JSON on standard input (a command line would show the secret to every user
of the machine); when its links are up, or cannot be, it prints one line of JSON; and it ends when standard input
does, so that no parent can leave it behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import garbage
from ..errors import PimoeError, from_wire
from ..links import Endpoint, LinkServer
from ..links.addresses import new_unix_address
from ..loop_thread import new_event_loop
from ..model.checkpoint import Checkpoint
from ..model.families import read_spec
from ..tensors import torch_dtype
from .group import ExpertGroup
from .options import DEFAULTS, ExpertOptions
from .server import ExpertGroupHandler

_CLOSE_TIMEOUT_S = 5.0
_MAX_ANSWER_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class GroupProcessConfig:
    """What a group's process is told."""

    name: str
    folder: str
    experts: tuple[int, ...]
    dtype: str
    secret: str
    threads: int = 1
    options: ExpertOptions = DEFAULTS
    device: str = "cpu"


class GroupProcess:
    """A running process of a group, seen from its parent. It is in a session of its own: Ctrl-C in a terminal is
    its parent's to handle."""

    def __init__(
        self, config: GroupProcessConfig, process: asyncio.subprocess.Process, endpoint: Endpoint
    ) -> None:
        self.config = config
        self.process = process
        self.endpoint = endpoint

    @classmethod
    async def start(cls, config: GroupProcessConfig, timeout_s: float = 120.0) -> GroupProcess:
        """Start it and wait until its link is up. When this raises, cancelled or not, the process is gone.

        Raises:
            ConfigurationError, CheckpointError: it could not load its experts.
            RuntimeError: it ended for another reason; its own error is on standard error.
            TimeoutError.
        """
        address = new_unix_address((config.name,))
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pimoe.runtime.experts.process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=_MAX_ANSWER_BYTES,
            )
            try:
                async with asyncio.timeout(timeout_s):
                    ready = await _tell(process, {**asdict(config), "address": address})
            except BaseException:
                await _kill(process)
                raise
        except BaseException:
            _remove_socket(address)
            raise
        endpoint = Endpoint(f"{config.name}-{process.pid}", socket.gethostname(), (address,), ready)
        return cls(config, process, endpoint)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.returncode is None

    async def close(self) -> None:
        """End it by closing its standard input; kill it if that does not help."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.process.wait()
        finally:
            await _kill(self.process)
            _remove_socket(self.endpoint.addresses[0])


async def _tell(process: asyncio.subprocess.Process, fields: dict[str, Any]) -> dict[str, Any]:
    """Give a new process its configuration; what it says when it is ready."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(fields).encode() + b"\n")
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of expert group {fields['name']} ended before it was ready")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise from_wire(answer["error"])
    return answer


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _remove_socket(address: str) -> None:
    """Of a process that was killed; one that ended by itself has removed its own."""
    path = Path(address.removeprefix("unix:"))
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.parent.rmdir()


def _load(config: GroupProcessConfig) -> ExpertGroup:
    torch.set_num_threads(config.threads)
    checkpoint = Checkpoint(Path(config.folder))
    spec, dtype = read_spec(checkpoint).experts, torch_dtype(config.dtype)
    return ExpertGroup.load(checkpoint, spec, config.experts, dtype, config.device, config.options)


async def _serve(config: GroupProcessConfig, address: str, parent: TextIO) -> None:
    handler = ExpertGroupHandler(_load(config), config.device)
    garbage.settle()
    server = LinkServer(handler, config.secret.encode(), credits=2)
    await server.listen_unix(address)
    try:
        _say(parent, {"pid": os.getpid(), **handler.describe()})
        await _end_of_stdin()
    finally:
        handler.close()
        await server.close()


def _say(parent: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=parent, flush=True)


async def _end_of_stdin() -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(1024):
        pass


def main() -> None:
    """Entry point of the process."""
    # What a custom expert prints must neither pass for our answer nor fill a pipe that nobody reads any more.
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Unbuffered: what comes after the line belongs to the event loop.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        fields = json.loads(stdin.readline())
    address = fields.pop("address")
    options = ExpertOptions(**fields.pop("options"))
    config = GroupProcessConfig(**{**fields, "experts": tuple(fields["experts"]), "options": options})
    try:
        new_event_loop().run_until_complete(_serve(config, address, parent))
    except PimoeError as error:
        _say(parent, {"error": error.to_wire()})
        sys.exit(1)


if __name__ == "__main__":
    main()
