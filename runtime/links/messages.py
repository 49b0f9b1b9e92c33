"""What travels over a link, as its users see it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..requests import TensorData


@dataclass(slots=True)
class Call:
    """A request as the server's handler gets it.

    Attributes:
        deadline: on the handler's own event loop clock (`loop.time()`).
    """

    method: str
    meta: dict[str, Any]
    tensors: list[TensorData]
    deadline: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or one item of a streamed one."""

    meta: dict[str, Any] = field(default_factory=dict)
    tensors: Sequence[TensorData] = ()


# A handler answers at once, later, or with a stream. Answering at once costs no task.
Handler = Callable[[Call], Reply | Awaitable[Reply] | AsyncIterator[Reply]]
