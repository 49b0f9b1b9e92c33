"""The router: the trunk and gates of a model, in front of its expert groups. A `Backend` in this process."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batching import Batcher, BatchLimits, Computed, QueueLimits
from ..errors import InvalidRequestError, InvalidTensorError, PimoeError, UnavailableError
from ..generation.engine import Engine
from ..model.decoder import Decoder
from ..requests import (
    DTYPE_BYTES,
    GenerateRequest,
    InferRequest,
    InferResult,
    ModelInfo,
    TensorData,
    TokenChunk,
)
from ..routing.dispatch import Dispatcher
from ..routing.strategies import RoutingStrategy
from ..tasks import gather_or_cancel
from .limits import RouterLimits
from .rows import Outputs, RowBuffers, are_finite, gather, join_rows, split_rows

_FLOATING = ("float32", "float16", "bfloat16", "float64")


class Router:
    """Batches tensor requests, and generates when the model is a decoder.

    Args:
        gates: routing strategy of every MoE layer.
        decoder: the trunk; None for a layer model.
        folder: of the checkpoint, for its tokenizer; see `Engine`.
    """

    def __init__(
        self,
        model: ModelInfo,
        gates: Mapping[int, RoutingStrategy],
        dispatcher: Dispatcher,
        decoder: Decoder | None,
        limits: RouterLimits,
        device: str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self._model = model
        self.gates = gates
        self.dispatcher = dispatcher
        self.decoder = decoder
        self.limits = limits
        self.device = device
        self._buffers = RowBuffers(model.hidden_size * DTYPE_BYTES[model.dtype])
        self.batcher: Batcher[tuple[int, TensorData], TensorData] = Batcher(
            self._run_layer, limits.batching, limits.queue, servers=dispatcher.parallelism
        )
        self.engine: Engine | None = None
        self._layer_s = 0.0
        if decoder is not None:
            self.engine = Engine(decoder, dispatcher, limits.engine, limits.batching, limits.queue, folder=folder)
            # What fits the KV cache here may be less than the model could take.
            self._model = replace(model, max_context_tokens=self.engine.max_context_tokens)

    def start(self) -> None:
        """Begin to serve, on the running event loop."""
        self.batcher.start()
        if self.engine is not None:
            self.engine.start()

    async def close(self) -> None:
        """Finish or fail what is under way."""
        if self.engine is not None:
            await self.engine.close()
        await self.batcher.close()

    @property
    def model(self) -> ModelInfo:
        """See `Backend`."""
        return self._model

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Backend`. A request longer than a batch is cut into several."""
        layer = self.model.moe_layers[0] if request.layer is None else request.layer
        states = request.hidden_states
        self._check(layer, states)
        rows, priority, timeout_s = states.shape[0], request.priority, request.timeout_s
        most = self.limits.batching.max_batch_tokens
        if rows <= most:
            return InferResult(await self.batcher.submit((layer, states), rows, priority, timeout_s, layer))
        calls = [
            self.batcher.submit((layer, piece), piece.shape[0], priority, timeout_s, layer)
            for piece in split_rows(states, most)
        ]
        return InferResult(join_rows(await gather_or_cancel(calls)))

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `Backend`."""
        if self.engine is None:
            raise InvalidRequestError(
                f"{self.model.name} is a layer model: it answers tensor requests only", "model"
            )
        return self.engine.generate(request)

    def _check(self, layer: int, states: TensorData) -> None:
        """All but whether its numbers are numbers, which is seen for a whole batch at once."""
        if layer not in self.gates:
            layers = self.model.moe_layers
            raise InvalidTensorError(
                f"layer {layer} is not an MoE layer of {self.model.name}; {layers} are", "layer"
            )
        if states.dtype not in _FLOATING:
            raise InvalidTensorError(f"hidden states are {states.dtype}; they must be one of {_FLOATING}")
        if len(states.shape) != 2 or states.shape[1] != self.model.hidden_size or states.shape[0] < 1:
            raise InvalidTensorError(
                f"hidden states have shape {list(states.shape)}; it must be [tokens, {self.model.hidden_size}]"
            )
        if states.nbytes != math.prod(states.shape) * DTYPE_BYTES[states.dtype]:
            raise InvalidTensorError(
                f"hidden states of shape {list(states.shape)} in {states.dtype} do not have {states.nbytes} bytes"
            )

    async def _run_layer(self, batch: Sequence[tuple[int, TensorData]], deadline: float) -> Computed[TensorData]:
        started = time.monotonic()
        buffer = self._buffers.take(sum(states.shape[0] for _, states in batch))
        results, largest = await self._run_gathered(batch[0][0], [states for _, states in batch], buffer, deadline)
        # Only now, and not after a failure: frames that are not written yet may be views of it.
        self._buffers.give_back(buffer)
        self._layer_s += time.monotonic() - started
        return Computed(results, largest)

    async def _run_gathered(
        self, layer: int, batch: list[TensorData], buffer: Tensor, deadline: float
    ) -> tuple[list[TensorData | PimoeError], int]:
        with torch.inference_mode():
            hidden = gather(batch, self.model.dtype, buffer).to(self.device)
            if not are_finite(hidden):
                return await self._run_without_bad(layer, batch, buffer, deadline)
            routing = self.gates[layer](hidden)
        alone = len(batch) == 1  # else others may come while this thread would wait
        done = await self.dispatcher.run_counted(layer, hidden, routing, deadline, lanes=alone)
        with torch.inference_mode():
            return self._cut(done.output, batch), done.largest_expert_tokens

    async def _run_without_bad(
        self, layer: int, batch: list[TensorData], buffer: Tensor, deadline: float
    ) -> tuple[list[TensorData | PimoeError], int]:
        """Those that are right are computed as if the others had not come."""
        bad = InvalidTensorError(f"hidden states hold NaN, Inf or numbers out of {self.model.dtype}'s range")
        right = [are_finite(gather([states], self.model.dtype, buffer)) for states in batch]
        rest = [states for states, is_right in zip(batch, right, strict=True) if is_right]
        results, largest = await self._run_gathered(layer, rest, buffer, deadline) if rest else ([], 0)
        computed = iter(results)
        return [next(computed) if is_right else bad for is_right in right], largest

    def _cut(self, output: Tensor, batch: Sequence[TensorData]) -> list[TensorData | PimoeError]:
        """Each request's rows, in its own dtype."""
        outputs, start = Outputs(output), 0
        results: list[TensorData | PimoeError] = []
        for states in batch:
            end = start + states.shape[0]
            rows = outputs.slice(start, end, states.dtype)
            results.append(rows if rows is not None else self._overflow())
            start = end
        return results

    def _overflow(self) -> PimoeError:
        return InvalidTensorError(f"the output overflows: its numbers do not fit {self.model.dtype}")

    def set_batch_limits(self, limits: BatchLimits) -> None:
        """Change the bounds of batching while serving; what is queued keeps its place."""
        self.limits = replace(self.limits, batching=limits)
        self.batcher.limits = limits
        if self.engine is not None:
            self.engine.batch_limits = limits

    def set_queue_limits(self, limits: QueueLimits) -> None:
        """Change the bounds of the queues while serving; what waits already is not turned away."""
        self.limits = replace(self.limits, queue=limits)
        self.batcher.queue.limits = limits
        if self.engine is not None:
            self.engine.queue.limits = limits

    def check(self) -> None:
        """Raises: UnavailableError when a loop has ended, so that nothing would be answered any more."""
        if not self.batcher.alive or not (self.engine is None or self.engine.alive):
            raise UnavailableError("the router's batcher or engine has ended")

    def busy_s(self) -> float:
        """Seconds since start that steps and batches took, less those in which they waited for experts: more
        routers would not shorten that."""
        steps_s = self.engine.statistics().step_s if self.engine is not None else 0.0
        return steps_s + self._layer_s - self.dispatcher.statistics().waiting_s

    def statistics(self) -> dict[str, Any]:
        """Everything countable, as plain values."""
        return {
            "batcher": self.batcher.statistics().as_plain(),
            "engine": None if self.engine is None else self.engine.statistics().as_plain(),
            "dispatch": self.dispatcher.statistics().as_plain(self.limits.per_expert_metrics),
        }
