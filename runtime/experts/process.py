"""One expert group as a local process: `python -m pimoe.runtime.experts.process`.

Its configuration comes as one line of JSON on standard input (a command line would show the secret to every user
of the machine); when its links are up it prints one line of JSON, and it ends when standard input does, so that no
parent can leave it behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..links import Endpoint, LinkServer
from ..links.addresses import new_unix_address
from ..loop_thread import new_event_loop
from ..model.checkpoint import Checkpoint
from ..model.families import read_spec
from ..tensors import torch_dtype
from .group import ExpertGroup
from .server import ExpertGroupHandler


@dataclass(frozen=True, slots=True)
class GroupProcessConfig:
    """What a group's process is told."""

    name: str
    folder: str
    experts: tuple[int, ...]
    dtype: str
    secret: str
    threads: int = 1


class GroupProcess:
    """A running process of a group, seen from its parent."""

    def __init__(
        self, config: GroupProcessConfig, process: asyncio.subprocess.Process, endpoint: Endpoint
    ) -> None:
        self.config = config
        self.process = process
        self.endpoint = endpoint

    @classmethod
    async def start(cls, config: GroupProcessConfig, timeout_s: float = 120.0) -> GroupProcess:
        """Start it and wait until its link is up.

        Raises:
            RuntimeError: it ended instead; its own error is on standard error.
            TimeoutError.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pimoe.runtime.experts.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                line = await process.stdout.readline()
            if not line:
                raise RuntimeError(f"the process of expert group {config.name} ended before it was ready")
        except BaseException:
            await _kill(process)
            raise
        ready = json.loads(line)
        endpoint = Endpoint(f"{config.name}-{process.pid}", socket.gethostname(), (ready.pop("address"),), ready)
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
            async with asyncio.timeout(5):
                await self.process.wait()
        except TimeoutError:
            await _kill(self.process)


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _serve(config: GroupProcessConfig) -> None:
    torch.set_num_threads(config.threads)
    checkpoint = Checkpoint(Path(config.folder))
    group = ExpertGroup.load(checkpoint, read_spec(checkpoint).experts, config.experts, torch_dtype(config.dtype))
    handler = ExpertGroupHandler(group)
    server = LinkServer(handler, config.secret.encode(), credits=2)
    address = await server.listen_unix(new_unix_address((config.name,)))
    print(json.dumps({"address": address, "pid": os.getpid(), **handler.describe()}), flush=True)
    try:
        await _end_of_stdin()
    finally:
        await server.close()


async def _end_of_stdin() -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(1024):
        pass


def main() -> None:
    """Entry point of the process."""
    # Unbuffered: what comes after the line belongs to the event loop.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        fields = json.loads(stdin.readline())
    config = GroupProcessConfig(**{**fields, "experts": tuple(fields["experts"])})
    loop = new_event_loop()
    loop.run_until_complete(_serve(config))


if __name__ == "__main__":
    main()
