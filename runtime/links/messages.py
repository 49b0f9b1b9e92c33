"""What travels over a link, as its users see it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..requests import TensorData

Buffer = bytes | bytearray | memoryview


class Packed(NamedTuple):
    """A call, or its answer, whose layout is its method's own: for what is sent thousands of times a second, and
    for which reading maps and describing tensors would take longer than sending.

    Attributes:
        meta: of a length that the method knows, and with the version of its layout.
        body: flat buffers of bytes, written one after the other; of one that was received, a single buffer,
            over memory that is the receiver's as long as it has a view of it.
    """

    meta: bytes
    body: Sequence[Buffer] = ()


@dataclass(slots=True)
class Call:
    """A request as the server's handler gets it.

    Attributes:
        deadline: on the handler's own event loop clock (`loop.time()`).
        packed: instead of `meta` and `tensors`, where the caller packed them itself.
    """

    method: str
    meta: dict[str, Any]
    tensors: list[TensorData]
    deadline: float
    packed: Packed | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or one item of a streamed one."""

    meta: dict[str, Any] = field(default_factory=dict)
    tensors: Sequence[TensorData] = ()


# A handler answers at once, later, or with a stream. Answering at once costs no task. A packed call has a packed
# answer.
Handler = Callable[[Call], Reply | Packed | Awaitable[Reply | Packed] | AsyncIterator[Reply]]
