"""The layer behind mosec: HTTP and batching in Rust, Python only where it computes."""

from __future__ import annotations

import sys

from moe_layer import MAX_BATCH_REQUESTS, MAX_WAIT_S, options
from mosec import Server, Worker


class Layer(Worker):
    """Bytes in, bytes out: what mosec's codecs would do is not needed."""

    def __init__(self) -> None:
        super().__init__()
        self._layer = options().layer()

    def deserialize(self, data: bytes) -> bytes:
        """As it came."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """As it goes."""
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        """A batch."""
        return self._layer.many(data)


def main() -> None:
    """Serve until a signal. mosec has a command line of its own."""
    chosen = options()
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", str(chosen.port), "--log-level", "error"]
    server = Server()
    server.append_worker(
        Layer,
        num=chosen.workers,
        max_batch_size=MAX_BATCH_REQUESTS,
        max_wait_time=round(1000 * MAX_WAIT_S),
    )
    server.run()


if __name__ == "__main__":
    main()
