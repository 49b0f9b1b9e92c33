"""The layer behind NVIDIA's Triton Inference Server, as nvidia-pytriton brings it."""

from __future__ import annotations

from typing import Any

import numpy as np
from moe_layer import MAX_BATCH_REQUESTS, MAX_WAIT_S, MoeLayer, options
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

TOKENS = 4


class Inference:
    """One instance of the model."""

    def __init__(self, layer: MoeLayer) -> None:
        self._layer = layer

    @batch
    def __call__(self, hidden_states: NDArray[np.float32], **_: Any) -> list[NDArray[np.float32]]:
        """`[requests, tokens, hidden]`."""
        return [self._layer.array(hidden_states.reshape(-1)).reshape(hidden_states.shape)]


def main() -> None:
    """Serve until a signal."""
    chosen = options()
    layers = [chosen.layer() for _ in range(chosen.workers)]
    shape = (TOKENS, layers[0].hidden)
    config = TritonConfig(
        http_address="127.0.0.1", http_port=chosen.port, allow_grpc=False, allow_metrics=False, log_verbose=0
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="layer",
            infer_func=[Inference(layer) for layer in layers],
            inputs=[Tensor(name="hidden_states", dtype=np.float32, shape=shape)],
            outputs=[Tensor(name="output", dtype=np.float32, shape=shape)],
            config=ModelConfig(
                max_batch_size=MAX_BATCH_REQUESTS,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(1e6 * MAX_WAIT_S)),
            ),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
