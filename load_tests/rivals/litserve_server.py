"""The layer behind LitServe, with the queue over ZeroMQ that its documentation has for high rates."""

# LitServe reads the annotations of `decode_request`, so they must not become strings.
from typing import Annotated

import litserve
from fastapi import Depends, Request
from fastapi.responses import Response
from moe_layer import MAX_BATCH_REQUESTS, MAX_WAIT_S, MoeLayer, Options, options


async def _body(request: Request) -> bytes:
    """Past LitServe's own reader, which knows JSON and forms only."""
    return await request.body()


class Layer(litserve.LitAPI):
    """Bytes in, bytes out."""

    def __init__(self, chosen: Options) -> None:
        super().__init__(max_batch_size=MAX_BATCH_REQUESTS, batch_timeout=MAX_WAIT_S, api_path="/infer")
        self._chosen = chosen
        self._layer: MoeLayer

    def setup(self, device: str) -> None:
        """In the worker's process."""
        self._layer = self._chosen.layer()

    def decode_request(self, request: Annotated[bytes, Depends(_body)]) -> bytes:  # type: ignore[override]
        """As it came."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """As a list."""
        return inputs

    def predict(self, inputs: list[bytes]) -> list[bytes]:  # type: ignore[override]
        """A batch."""
        return self._layer.many(inputs)

    def unbatch(self, output: list[bytes]) -> list[bytes]:  # type: ignore[override]
        """Still a list."""
        return output

    def encode_response(self, output: bytes) -> Response:  # type: ignore[override]
        """Without FastAPI's encoder, which knows text only."""
        return Response(output, media_type="application/octet-stream")


def main() -> None:
    """Serve until a signal."""
    chosen = options()
    server = litserve.LitServer(
        Layer(chosen),
        accelerator="cpu",
        devices=1,
        workers_per_device=chosen.workers,
        fast_queue=True,
        timeout=60,
    )
    server.run(
        host="127.0.0.1",
        port=chosen.port,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
