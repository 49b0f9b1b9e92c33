"""The trunk of a decoder: embeddings, attention, gates, shared and dense networks, logits. Not the experts.

It knows neither groups nor links: what its gates chose goes to an `ExpertDispatch`, and what comes back is
added. It keeps no requests either: the engine says which tokens go into which blocks of the cache.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..native.trunk import add, rms_norm
from ..routing.in_tiles import row_by_row
from ..routing.strategies import Routing, RoutingStrategy
from .attention import Attention
from .checkpoint import Checkpoint
from .feed_forward import GatedFeedForward, SharedExpert
from .kv_cache import BLOCK_TOKENS, KVCache, KVLayout
from .latent_attention import LatentAttention, read_latent_weights
from .native_attention import NativeAttention, has_native_attention
from .rope import RotaryTable
from .spec import DecoderSpec
from .step import ForwardBatch, Segment, Step, plan_step
from .tiles import check_tiles
from .trunk_weights import TrunkWeights

__all__ = ["Decoder", "ExpertDispatch", "ForwardBatch", "KVCache", "Segment"]


# Cosine and sine from `RotaryTable.rows`.
Rotary = tuple[Tensor, Tensor]


class ExpertDispatch(Protocol):
    """Sends tokens to their experts, wherever those are, and brings back the weighted sums."""

    async def __call__(self, layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        """`hidden [tokens, hidden]` in the model's dtype -> float32 `[tokens, hidden]`, the weighted sum over each
        token's experts."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer. `dense` is set where the layer has no experts; `shared` where every token passes one; `native`
    where kernels compute it up to its experts, norms included."""

    attention_norm: Tensor
    attention: Attention | LatentAttention
    feed_forward_norm: Tensor
    dense: GatedFeedForward | None
    shared: SharedExpert | None
    native: NativeAttention | None


class Decoder:
    """The trunk; make one with `load`.

    Attributes:
        spec: the model.
        dtype, device: of weights and hidden states.
        gates: layer -> routing strategy; may be replaced by another strategy.
        weights_bytes: memory of the trunk's tensors.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: TrunkWeights,
        dtype: torch.dtype,
        device: torch.device,
        batch_invariant: bool = False,
    ) -> None:
        self.spec, self.dtype, self.device, self.batch_invariant = spec, dtype, device, batch_invariant
        self._embedding = weights.read("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
        self._is_native = has_native_attention(spec, dtype, device)
        self._layers = [_read_layer(spec, weights, layer, self._is_native) for layer in range(spec.num_layers)]
        self.gates: dict[int, RoutingStrategy] = {
            layer: weights.strategy(layer) for layer in spec.experts.moe_layers
        }
        self._norm = weights.norm("model.norm")
        self._head = weights.head(self._embedding)
        self._rotary = RotaryTable(spec.rope, spec.rotary_dim, device)
        self.weights_bytes = weights.nbytes
        if batch_invariant:
            self.gates = {layer: row_by_row(gate) for layer, gate in self.gates.items()}
            check_tiles(self._head, spec.hidden_size, dtype, device)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        batch_invariant: bool = False,
    ) -> Decoder:
        """Reads the trunk's tensors, and no expert's.

        Args:
            checkpoint: the folder.
            spec: from `read_spec(checkpoint)`.
            dtype: of weights and hidden states; None for the config's.
            device: where to compute.
            batch_invariant: whether a token's numbers are the same to the bit whatever else is computed with it;
                see `tiles`.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
            ConfigurationError: this machine cannot compute batch-invariantly.
        """
        dtype, device = dtype or getattr(torch, spec.dtype), torch.device(device)
        return cls(spec, TrunkWeights(checkpoint, spec, dtype, device), dtype, device, batch_invariant)

    @property
    def kv_layout(self) -> KVLayout:
        """What a cache keeps of each token."""
        spec = self.spec
        return KVLayout(spec.num_layers, spec.cached_heads, spec.cached_key_dim, spec.cached_value_dim)

    def new_cache(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS) -> KVCache:
        """An empty KV cache for this model."""
        return KVCache(self.kv_layout, num_blocks, block_tokens, self.dtype, self.device)

    async def forward(self, batch: ForwardBatch, cache: KVCache, experts: ExpertDispatch) -> Tensor:
        """New tokens of several sequences through the whole model.

        A forward that fails or is cancelled leaves `cache` fit for the same forward again. Of the last layer
        only the rows in `output_rows` are computed beyond attention, so its experts see no others.

        Args:
            batch: prefill and decode mixed as it comes.
            cache: holds what came before; gets the new tokens' keys and values.
            experts: awaited once per MoE layer, with `[tokens, hidden]` (`[outputs, hidden]` in the last layer).

        Returns:
            Logits `[outputs, vocab]`, float32.

        Raises:
            IndexError: a segment's blocks are too few. Whatever `experts` raises.
        """
        step, rotary, hidden = self._begin(batch, cache)
        for index, layer in enumerate(self._layers):
            last = index == len(self._layers) - 1
            hidden, normed = self._attend(layer, hidden, step, rotary, cache, step.output_rows if last else None)
            if not normed.shape[0]:  # a chunk of a prompt: nobody reads what comes after the last attention
                return hidden.new_empty((0, self.spec.vocab_size), dtype=torch.float32)
            if layer.dense is not None:
                hidden = _add(hidden, layer.dense, normed, step)
            else:
                routing = self._route(index, normed)
                sent = _through_experts(layer.shared, index, normed, routing, experts, step)
                shared_out, expert_out = await sent
                hidden = self._combine(hidden, expert_out, shared_out)
        return self._logits(hidden, step)

    @torch.inference_mode()
    def _begin(self, batch: ForwardBatch, cache: KVCache) -> tuple[Step, Rotary | None, Tensor]:
        windows = set(self.spec.sliding_windows)
        native = self._rotary if self._is_native else None
        step = plan_step(batch, cache.block_tokens, windows, self.dtype, self.device, self.batch_invariant, native)
        rotary = None if native else self._rotary.rows(step.positions, step.length, self.dtype)
        return step, rotary, F.embedding(batch.token_ids.to(self.device), self._embedding)

    @torch.inference_mode()
    def _attend(
        self,
        layer: DecoderLayer,
        hidden: Tensor,
        step: Step,
        rotary: Rotary | None,
        cache: KVCache,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and what the feed-forward part of the layer reads."""
        if layer.native is not None:
            return layer.native(hidden, step, cache, rows)
        assert rotary is not None
        normed = self._rms_norm(hidden, layer.attention_norm, step)
        hidden = hidden + layer.attention(normed, step, rotary, cache)
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return hidden, self._rms_norm(hidden, layer.feed_forward_norm, step)

    @torch.inference_mode()
    def _route(self, layer: int, normed: Tensor) -> Routing:
        return self.gates[layer](normed)

    @torch.inference_mode()
    def _combine(self, hidden: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        if self._is_native and shared is None:
            return add(hidden, routed)
        out = routed.to(device=hidden.device, dtype=hidden.dtype)
        return hidden + (out if shared is None else out + shared)

    @torch.inference_mode()
    def _logits(self, hidden: Tensor, step: Step) -> Tensor:
        normed = self._rms_norm(hidden, self._norm, step)
        if self._head.native is not None:
            return self._head.native(normed, torch.float32)
        return step.by_rows(self._head, normed).float()

    def _rms_norm(self, hidden: Tensor, scale: Tensor, step: Step) -> Tensor:
        if self._is_native:
            return rms_norm(hidden, scale, self.spec.norm_eps)

        def norm(rows: Tensor) -> Tensor:
            # The scale outside: the reference rounds to the model's dtype before it, the fused kernel after it.
            return F.rms_norm(rows, (self.spec.hidden_size,), None, self.spec.norm_eps) * scale

        return step.by_rows(norm, hidden)


def _read_layer(spec: DecoderSpec, weights: TrunkWeights, layer: int, is_native: bool) -> DecoderLayer:
    prefix, has_experts = f"model.layers.{layer}", layer in spec.experts.moe_layers
    norms = weights.norm(f"{prefix}.input_layernorm"), weights.norm(f"{prefix}.post_attention_layernorm")
    attention = _read_attention(spec, weights, layer)
    native = None
    if is_native:
        assert isinstance(attention, Attention)
        native = NativeAttention(layer, spec, attention.weights, *norms)
    return DecoderLayer(
        attention_norm=norms[0],
        attention=attention,
        feed_forward_norm=norms[1],
        dense=None if has_experts else weights.dense(layer),
        shared=weights.shared_expert(layer) if has_experts else None,
        native=native,
    )


def _read_attention(spec: DecoderSpec, weights: TrunkWeights, layer: int) -> Attention | LatentAttention:
    if spec.latent is None:
        return Attention(layer, spec, weights.attention(layer))
    return LatentAttention(layer, spec, spec.latent, read_latent_weights(weights, spec, spec.latent, layer))


async def _through_experts(
    shared: SharedExpert | None, layer: int, normed: Tensor, routing: Routing, experts: ExpertDispatch, step: Step
) -> tuple[Tensor | None, Tensor]:
    """The shared expert's output, if there is one, and the routed experts' sum, computed at the same time."""
    if shared is None:
        return None, await experts(layer, normed, routing)
    dispatch = asyncio.ensure_future(experts(layer, normed, routing))
    try:
        await asyncio.sleep(0)  # the dispatch starts only when this coroutine yields
        shared_out = _apply(shared, normed, step)
        return shared_out, await dispatch
    finally:
        dispatch.cancel()  # does nothing once it is done


@torch.inference_mode()
def _apply(shared: SharedExpert, normed: Tensor, step: Step) -> Tensor:
    return step.by_rows(shared, normed)


@torch.inference_mode()
def _add(hidden: Tensor, network: GatedFeedForward, normed: Tensor, step: Step) -> Tensor:
    return hidden + step.by_rows(network, normed)
