"""Server-sent events, as far as OpenAI-style streams need them: bytes in, the `data` of each event out."""

from __future__ import annotations

from .errors import ProtocolError


class SseParser:
    """Feed it pieces of a stream however they were cut.

    Comments and the fields `event`, `id` and `retry` mean nothing to us and are passed over.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._tail = b""  # the line that is not complete yet
        self._data: list[bytes] = []  # the `data` lines of the event that is not complete yet
        self._data_bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The `data` of every event that `piece` completes.

        Raises:
            ProtocolError: an event is larger than `max_event_bytes`.
        """
        complete, newline, tail = (self._tail + piece).rpartition(b"\n")
        self._tail = tail
        events = []
        for line in complete.split(b"\n") if newline else ():
            event = self._line(line.removesuffix(b"\r"))
            if event is not None:
                events.append(event)
        if self._data_bytes + len(self._tail) > self._max_event_bytes:
            raise ProtocolError(f"an event of the stream is larger than {self._max_event_bytes} bytes")
        return events

    def _line(self, line: bytes) -> bytes | None:
        if line.startswith(b"data:"):
            data = line[5:].removeprefix(b" ")
            self._data.append(data)
            self._data_bytes += len(data)
            return None
        if line or not self._data:
            return None
        event = b"\n".join(self._data)
        self._data.clear()
        self._data_bytes = 0
        return event
