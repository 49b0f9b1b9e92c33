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
from ..errors import InvalidRequestError, InvalidTensorError, UnavailableError
from ..generation.engine import Engine
from ..model.decoder import Decoder
from ..requests import DTYPE_BYTES, GenerateRequest, InferRequest, InferResult, ModelInfo, TokenChunk
from ..routing.dispatch import Dispatcher
from ..routing.strategies import RoutingStrategy
from ..tasks import gather_or_cancel
from ..tensors import from_wire, to_wire, torch_dtype
from .limits import RouterLimits

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
        self.dtype = torch_dtype(model.dtype)
        self.batcher: Batcher[tuple[int, Tensor], Tensor] = Batcher(
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
        hidden = self._check_hidden(layer, request)
        pieces = torch.split(hidden, self.limits.batching.max_batch_tokens)
        calls = [
            self.batcher.submit((layer, piece), len(piece), request.priority, request.timeout_s, group=layer)
            for piece in pieces
        ]
        outputs = await gather_or_cancel(calls)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        output = output.to(torch_dtype(request.hidden_states.dtype))
        if not torch.isfinite(output).all():
            raise InvalidTensorError(f"the output overflows: its numbers do not fit {self.model.dtype}")
        return InferResult(to_wire(output))

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `Backend`."""
        if self.engine is None:
            raise InvalidRequestError(
                f"{self.model.name} is a layer model: it answers tensor requests only", "model"
            )
        return self.engine.generate(request)

    def _check_hidden(self, layer: int, request: InferRequest) -> Tensor:
        states = request.hidden_states
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
        hidden = from_wire(states, self.device).to(self.dtype)
        if not torch.isfinite(hidden).all():
            raise InvalidTensorError(f"hidden states hold NaN, Inf or numbers out of {self.model.dtype}'s range")
        return hidden

    async def _run_layer(self, batch: Sequence[tuple[int, Tensor]], deadline: float) -> Computed[Tensor]:
        layer = batch[0][0]
        sizes = [len(hidden) for _, hidden in batch]
        started = time.monotonic()
        with torch.inference_mode():
            hidden = batch[0][1] if len(batch) == 1 else torch.cat([hidden for _, hidden in batch])
            routing = self.gates[layer](hidden)
        done = await self.dispatcher.run_counted(layer, hidden, routing, deadline)
        self._layer_s += time.monotonic() - started
        return Computed(torch.split(done.output, sizes), done.largest_expert_tokens)

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
