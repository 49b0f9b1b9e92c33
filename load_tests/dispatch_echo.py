"""Ways to send bytes to several processes at once and to get them back: links, ZeroMQ, Ray's actors and handles.
Each sends to all and then waits for each answer, so that none of them needs tasks. What comes back is given to a
check: of lengths while times are taken (`same_length`), of all bytes once before (`same_bytes`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pimoe.runtime.links import LinkPool, Packed
from pimoe.runtime.loop_thread import LoopThread
from pimoe.runtime.tensors import array_to_wire

LANE = "lane"  # of dispatches only: experts answer there, not bytes
LINK, SOCKET, GENERIC, ZMQ, ACTOR, HANDLE = ECHO_WAYS = (
    *("link", "link, socket only", "link, generic call"),  # large bodies of the others go through shared memory
    *("ZeroMQ", "actor", "handle"),
)
TIMEOUT_S = 60.0
# Of the parts of one answer, and what was sent; raises RuntimeError.
Check = Callable[[Sequence[memoryview], NDArray[np.int32]], None]


def same_length(parts: Sequence[memoryview], array: NDArray[np.int32]) -> None:
    """Raises: RuntimeError: more or fewer bytes came back."""
    if (received := sum(part.nbytes for part in parts)) != array.nbytes:
        raise RuntimeError(f"{received} bytes came back of {array.nbytes}")


def same_bytes(parts: Sequence[memoryview], array: NDArray[np.int32]) -> None:
    """Raises: RuntimeError: other bytes came back."""
    if b"".join(parts) != array.tobytes():
        raise RuntimeError(f"other bytes came back than the {array.nbytes} that were sent")


def payload(size_bytes: int) -> NDArray[np.int32]:
    """Random bytes, the same for the same size; a multiple of four."""
    info = np.iinfo(np.int32)
    random = np.random.default_rng(size_bytes)
    return random.integers(info.min, info.max, size_bytes // 4, np.int32, endpoint=True)


def without_zmq() -> str | None:
    """Why ZeroMQ cannot take part; None: it can."""
    return None if importlib.util.find_spec("zmq") else "pyzmq is not installed"


class ZmqEcho:
    """A ROUTER that sends back what it gets, on a loop of its own as links have it. `close` it."""

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zmq-", ignore_cleanup_errors=True)
        self.address = f"ipc://{self._folder.name}/{name}"
        self._thread = LoopThread(f"{name}-zmq")
        self._thread.run(self._open(), TIMEOUT_S)

    async def _open(self) -> None:
        import zmq
        import zmq.asyncio

        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.address)
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            # Without copies, but for messages so small that copying them is cheaper: zmq decides.
            await self._socket.send_multipart(await self._socket.recv_multipart(copy=False), copy=False)

    def close(self) -> None:
        """Stop answering."""
        self._thread.run(self._stop(), TIMEOUT_S)
        self._thread.close()
        self._folder.cleanup()

    async def _stop(self) -> None:
        self._serving.cancel()
        await asyncio.wait([self._serving])
        self._context.destroy(linger=0)


async def link_echo(pools: Sequence[LinkPool], array: NDArray[np.int32], check: Check) -> None:
    """As the dispatcher does it: packed, and `done` is told of each answer. On the loop of the links.

    Raises:
        PimoeError: a link failed.
        RuntimeError: by the check.
    """
    everything = asyncio.get_running_loop().create_future()
    outcomes: list[Packed | BaseException] = []

    def done(outcome: Packed | BaseException) -> None:
        outcomes.append(outcome)
        if len(outcomes) == len(pools):
            everything.set_result(None)

    deadline, sent = time.monotonic() + TIMEOUT_S, memoryview(array).cast("B")
    for pool in pools:
        pool.send("echo", Packed(b"", (sent,)), deadline, done)
    await everything
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        check([memoryview(part) for part in outcome.body], array)


async def generic_echo(pools: Sequence[LinkPool], array: NDArray[np.int32], check: Check) -> None:
    """As everything else does it: a call with a map and described tensors, and a task for each pool.

    Raises:
        PimoeError: a link failed.
        RuntimeError: by the check.
    """
    deadline, sent = time.monotonic() + TIMEOUT_S, [array_to_wire(array)]
    for reply in await asyncio.gather(*(pool.call("echo", {}, sent, deadline) for pool in pools)):
        check([memoryview(tensor.data) for tensor in reply.tensors], array)


async def zmq_echo(sockets: Sequence[Any], array: NDArray[np.int32], check: Check) -> None:
    """Without copies where zmq finds that worth it. Raises: RuntimeError: by the check."""
    for socket in sockets:
        await socket.send(memoryview(array).cast("B"), copy=False)
    for socket in sockets:
        check([memoryview((await socket.recv(copy=False)).buffer)], array)


async def ray_echo(callees: Sequence[Any], array: NDArray[np.int32], check: Check) -> None:
    """Of actors and handles. numpy's arrays cross Ray without the copies that torch's tensors take.

    Raises:
        RuntimeError: by the check.
    """
    answers = [callee.echo.remote(array) for callee in callees]
    for answer in answers:
        check([memoryview(await answer).cast("B")], array)


async def open_dealers(addresses: Sequence[str]) -> list[Any]:
    """A socket for each `ZmqEcho`."""
    import zmq
    import zmq.asyncio

    context = zmq.asyncio.Context.instance()
    sockets = [context.socket(zmq.DEALER) for _ in addresses]
    for socket, address in zip(sockets, addresses, strict=True):
        socket.connect(address)
    return sockets
