"""The seam between a client and HTTP: what a client sends, and what it needs of the answer.

Anything with these two methods can stand in for the network, which is how clients are tested without sockets.
A transport reports trouble with `ConnectionFailed` or `ProtocolError` and has no deadlines of its own beyond the
one for connecting: the caller puts a time on every wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | memoryview


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request.

    Attributes:
        path: begins with a slash, percent-encoded.
        body: sent one after the other, so that a large array need not be copied into one body.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: tuple[Buffer, ...] = ()


class HttpResponse(Protocol):
    """An answer whose head has arrived."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Found by lower-case names."""
        ...

    async def read_some(self) -> bytes:
        """The next bytes of the body, as soon as there are any; empty at its end.

        Raises:
            ConnectionFailed: the connection broke before the end.
        """
        ...

    def close(self) -> None:
        """Drops the connection unless the body has been read to its end; harmless when repeated."""
        ...


class Transport(Protocol):
    """Carries requests to one server."""

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Sends `request` and waits for the head of its answer. Cancelling drops the connection.

        Raises:
            ConnectionFailed: not connected, or broken before an answer.
            ProtocolError: what answered does not speak HTTP.
        """
        ...

    async def close(self) -> None:
        """Closes all connections."""
        ...
