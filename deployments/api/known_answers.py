"""What requests became, by their very bytes: a hit of the cache is then sent again without being read, keyed or
written anew.

Nothing here decides whether an answer is still right. What is kept was answered by entries of the result cache,
and `GatewayContext.recall` says, each time, whether the cache would give these very entries now: after a flush, an
expiry, another model or a cache that was switched off it does not, and the request takes the long way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from .errors import Headers

MAX_BYTES = 32 << 20
_MAX_ENTRY_BYTES = MAX_BYTES // 16
_ENTRY_OVERHEAD_BYTES = 2048  # tuples, headers, and the place in the table

# The headers of a request that any handler reads, in the order that they came in, each as often as it came.
ReadHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]

# Path, headers and body: the whole bytes and no digest of them, so that two requests are never taken for one.
Asked: TypeAlias = tuple[str, ReadHeaders, bytes]


class KnownAnswer(NamedTuple):
    """An answer as it was sent, but for its request id; the hits that it was made of, and how many bytes these
    hold, perhaps longer than the cache does."""

    headers: Headers
    body: bytes
    hits: Sequence[object]
    held_bytes: int


class KnownAnswers:
    """Bounded; the longest unused go first.

    Args:
        max_bytes: of all requests and answers kept.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[Asked, KnownAnswer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, request: Asked) -> KnownAnswer | None:
        """What such a request was last answered with."""
        known = self._known.get(request)
        if known is not None:
            self._known.move_to_end(request)
        return known

    def put(self, request: Asked, answer: KnownAnswer) -> None:
        """Keep an answer that hits were made into, in place of an earlier one."""
        self.drop(request)
        size = _size_bytes(request, answer)
        if size > min(_MAX_ENTRY_BYTES, self._max_bytes):
            return
        self._known[request] = answer
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._bytes -= _size_bytes(*self._known.popitem(last=False))

    def drop(self, request: Asked) -> None:
        """Forget one that is not right any more."""
        if (answer := self._known.pop(request, None)) is not None:
            self._bytes -= _size_bytes(request, answer)

    def clear(self) -> None:
        """Forget all: what was flushed is not to lie about."""
        self._known.clear()
        self._bytes = 0


def _size_bytes(request: Asked, answer: KnownAnswer) -> int:
    _, headers, body = request
    asked = sum(len(name) + len(value) for name, value in headers) + len(body)
    return _ENTRY_OVERHEAD_BYTES + asked + len(answer.body) + answer.held_bytes
