"""Memory that both ends of a Unix link map. A large body is copied into it once, instead of into the socket and
out of it again; the frame that announces the body still travels over the socket.

The client makes it, with a half for each direction, and describes it in its proof of the secret; a server that can
open it says so in its welcome. It has no name in any file system (memfd_create(2)), so that nothing remains of
processes that are killed, and its size is sealed: a peer that shrank it could end who reads it.

    0       8      magic "PMOESHM1"
    8       8      bytes of each half
    16      32     token, so that descriptors of another process namespace are not taken for ours
    64      2*128  for each half a mark for each of 128 slots: 1 from when the sender puts a body there until at
                   the other end the last view of it is gone
    4096           the client's half, the server's half

Whoever knows the application's secret is trusted with this: a peer could change a body while it is read.
A process that is forked from one end is not an end.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import struct
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..errors import LinkProtocolError
from .messages import Buffer

_log = logging.getLogger(__name__)

_NAME = "pimoe-link"  # in lists of descriptors
_MAGIC = b"PMOESHM1"
_HEADER = struct.Struct("<8sQ32s")
_MARKS_AT = 64
_SLOTS = 128  # as many bodies are under way in one direction at most
_HALVES_AT = 4096
_ALIGNMENT = 64
# What systems and Pythons without such memory raise, and wrong sizes and descriptions.
_FAILURES = (OSError, AttributeError, OverflowError, ValueError, TypeError, KeyError, struct.error)


class SharedMemory(NamedTuple):
    """One end's view of it: where it puts bodies, and where it finds the other's."""

    outbox: Outbox
    inbox: Inbox


class Offer:
    """What a client that connects has made; `close` it when the server has answered. See `offer`."""

    def __init__(self, half_bytes: int) -> None:
        half_bytes += -half_bytes % mmap.PAGESIZE
        self._half_bytes, self._token = half_bytes, secrets.token_bytes(32)
        self._descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, _HALVES_AT + 2 * half_bytes)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._memory = mmap.mmap(self._descriptor, 0)
        except BaseException:
            self.close()
            raise
        self._memory[: _HEADER.size] = _HEADER.pack(_MAGIC, half_bytes, self._token)

    def described(self) -> dict[str, Any]:
        """What the server needs to open it, as plain values."""
        return {"pid": os.getpid(), "fd": self._descriptor, "token": self._token}

    def accepted(self) -> SharedMemory:
        """The client's end."""
        return _end(self._memory, self._half_bytes, is_client=True)

    def close(self) -> None:
        """What is mapped stays so."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def offer(half_bytes: int) -> Offer | None:
    """Memory for a link.

    Args:
        half_bytes: room for bodies under way, in each direction. Memory is used only as far as bodies fill it.

    Returns:
        None: there is none to be had here; the link works without.
    """
    try:
        return Offer(half_bytes)
    except _FAILURES as error:
        _log.info("links go without shared memory: %s", error)
        return None


def accept(described: object, most_bytes: int) -> SharedMemory | None:
    """The server's end of what a client offers.

    Args:
        described: `Offer.described`, as it came.
        most_bytes: of a half.

    Returns:
        None: it cannot be opened from here, or is not what it should be; the link works without.
    """
    try:
        return _opened(described, most_bytes)
    except _FAILURES as error:
        _log.info("a client's shared memory is not used: %s", error)
        return None


def _opened(described: Any, most_bytes: int) -> SharedMemory:
    # The same user's processes may open each other's descriptors this way: proc_pid_fd(5).
    path = f"/proc/{int(described['pid'])}/fd/{int(described['fd'])}"
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):  # opening something else might do something
        raise ValueError("it is another file")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & sealed != sealed:
            raise ValueError("its size is not sealed")
        size = os.fstat(descriptor).st_size
        memory = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    magic, half_bytes, token = _HEADER.unpack_from(memory)
    if magic != _MAGIC or not secrets.compare_digest(token, described["token"]):
        raise ValueError("it is not that client's")
    if size != _HALVES_AT + 2 * half_bytes or half_bytes > most_bytes + mmap.PAGESIZE:
        raise ValueError(f"it has {size} bytes")
    return _end(memory, half_bytes, is_client=False)


def _end(memory: mmap.mmap, half_bytes: int, is_client: bool) -> SharedMemory:
    whole = memoryview(memory)
    halves = [_HALVES_AT, _HALVES_AT + half_bytes]
    marks = [_MARKS_AT, _MARKS_AT + _SLOTS]
    own, other = (0, 1) if is_client else (1, 0)
    return SharedMemory(
        Outbox(whole[marks[own] :][:_SLOTS], whole[halves[own] :][:half_bytes]),
        Inbox(whole[marks[other] :][:_SLOTS], memory, halves[other], half_bytes),
    )


class Outbox:
    """Where a sender puts bodies: each at the lowest free place, so that memory that is warm is used again.

    Args:
        marks: of the slots; the reader clears them.
        half: where the bodies lie.
    """

    def __init__(self, marks: memoryview, half: memoryview) -> None:
        self._marks, self._half = marks, half
        self._free_slots = list(range(_SLOTS))
        self._used: list[tuple[int, int, int]] = []  # start, end and slot, in order

    def put(self, body: Sequence[Buffer], size: int) -> tuple[int, int] | None:
        """Copy a body of `size` bytes in.

        Returns:
            Its slot and place, for `Inbox.body`; None: there is no room now.
        """
        self._forget_dropped()
        if not self._free_slots or (found := self._gap(size)) is None:
            return None
        index, start = found
        slot = self._free_slots.pop()
        at = start
        for part in body:
            self._half[at : at + len(part)] = memoryview(part).cast("B")  # signed bytes may not be assigned
            at += len(part)
        self._marks[slot] = 1
        self._used.insert(index, (start, start + size, slot))
        return slot, start

    def _gap(self, size: int) -> tuple[int, int] | None:
        """The lowest that is large enough: its index among what is used, and its start."""
        start = 0
        for index, (begins, ends, _) in enumerate(self._used):
            if begins - start >= size:
                return index, start
            start = ends + -ends % _ALIGNMENT
        return (len(self._used), start) if len(self._half) - start >= size else None

    def _forget_dropped(self) -> None:
        marks = bytes(self._marks)  # one look at what the reader changes meanwhile
        self._free_slots += [slot for _, _, slot in self._used if not marks[slot]]
        self._used = [piece for piece in self._used if marks[piece[2]]]


class Inbox:
    """Where a receiver finds the bodies that its peer put there."""

    def __init__(self, marks: memoryview, memory: mmap.mmap, start: int, half_bytes: int) -> None:
        self._marks, self._memory = marks, memory
        self._start, self._half_bytes = start, half_bytes
        self._pid = os.getpid()
        self._read: dict[int, weakref.ref[Any]] = {}

    def body(self, slot: int, place: int, size: int) -> memoryview:
        """A body, without copying it. Its place is the sender's again when the last view of it is gone, on
        whatever thread that happens.

        Raises:
            LinkProtocolError: there can be none.
        """
        if slot >= _SLOTS or place + size > self._half_bytes or slot in self._read:
            raise LinkProtocolError(f"no body of {size} bytes can lie in slot {slot} at {place}")
        # Views keep their array alive, and an array tells when it goes.
        array = np.ndarray(size, np.uint8, self._memory, self._start + place)
        self._read[slot] = weakref.ref(array, partial(self._dropped, slot))
        return array.data

    def _dropped(self, slot: int, _: object) -> None:
        del self._read[slot]  # before the sender may use it again
        if os.getpid() == self._pid:  # a forked process drops what its parent may still read
            self._marks[slot] = 0
