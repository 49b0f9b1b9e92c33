"""Reads the trunk's tensors out of a checkpoint; the experts' tensors are never touched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing.grouped import GroupLimitedTopK
from ..routing.strategies import RoutingStrategy, SoftmaxOfTopK, TopKSoftmax
from .attention import AttentionWeights
from .checkpoint import Checkpoint
from .feed_forward import GatedFeedForward, SharedExpert
from .linear import Linear
from .quantized import read_weight
from .spec import DecoderSpec


class TrunkWeights:
    """Tensors by their names on the Hugging Face hub, on one device in one dtype, each checked for its shape.

    Args:
        checkpoint: the folder.
        spec: what it holds.
        dtype, device: of the tensors.

    Attributes:
        nbytes: memory of everything read so far.
    """

    def __init__(
        self, checkpoint: Checkpoint, spec: DecoderSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint, self._spec, self._dtype, self._device = checkpoint, spec, dtype, device
        self.nbytes = 0

    def read(self, name: str, *shape: int) -> Tensor:
        """One tensor. Raises CheckpointError where it is missing or has another shape; so do all below."""
        return self._read(name, self._dtype, shape)

    def _read(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        tensor = read_weight(self._checkpoint, name, dtype, shape, self._spec.experts.fp8_block).to(self._device)
        self.nbytes += tensor.nbytes
        return tensor

    def norm(self, name: str) -> Tensor:
        """The scale `[hidden]` of a norm."""
        return self.read(f"{name}.weight", self._spec.hidden_size)

    def gate(self, layer: int) -> Tensor:
        """The gate matrix `[experts, hidden]`."""
        return self.read(self._spec.gate_name(layer), self._spec.experts.num_experts, self._spec.hidden_size)

    def strategy(self, layer: int) -> RoutingStrategy:
        """How the layer's tokens choose their experts."""
        spec, gate = self._spec, self._spec.gate
        if gate.kind == "softmax":
            return TopKSoftmax(self.gate(layer), spec.top_k, spec.renormalize, gate.rounds_weights)
        name = spec.gate_name(layer)
        if gate.kind == "softmax_of_top_k":
            bias = self.read(f"{name.removesuffix('weight')}bias", spec.experts.num_experts)
            return SoftmaxOfTopK(self.gate(layer), bias, spec.top_k)
        correction = None
        if gate.correction_bias:
            bias_name = f"{name.removesuffix('weight')}e_score_correction_bias"
            correction = self._read(bias_name, torch.float32, (spec.experts.num_experts,))
        return GroupLimitedTopK(
            self._read(name, torch.float32, (spec.experts.num_experts, spec.hidden_size)),
            spec.top_k,
            gate.scores,
            correction,
            gate.groups,
            gate.top_groups,
            spec.renormalize,
            gate.scaling,
        )

    def head(self, embedding: Tensor) -> Linear:
        """The projection to logits: a matrix of its own, or the embedding `[vocab, hidden]` once more."""
        if not self._spec.tie_word_embeddings:
            return Linear(self.read("lm_head.weight", self._spec.vocab_size, self._spec.hidden_size))
        head = Linear(embedding)
        self.nbytes += head.nbytes if head.is_packed else 0  # another layout is another copy
        return head

    def attention(self, layer: int) -> AttentionWeights:
        """One layer's attention, with queries, keys and values merged."""
        spec, prefix = self._spec, f"model.layers.{layer}.self_attn"
        rows = {
            "q_proj": spec.num_heads * spec.head_dim,
            "k_proj": spec.num_kv_heads * spec.head_dim,
            "v_proj": spec.num_kv_heads * spec.head_dim,
        }
        qkv = torch.cat([self.read(f"{prefix}.{part}.weight", n, spec.hidden_size) for part, n in rows.items()])
        qkv_bias = output_bias = None
        if spec.qkv_bias:
            qkv_bias = torch.cat([self.read(f"{prefix}.{part}.bias", n) for part, n in rows.items()])
        output = self.read(f"{prefix}.o_proj.weight", spec.hidden_size, spec.num_heads * spec.head_dim)
        if spec.output_bias:
            output_bias = self.read(f"{prefix}.o_proj.bias", spec.hidden_size)
        sinks = self.read(f"{prefix}.sinks", spec.num_heads) if spec.attention_sinks else None
        return AttentionWeights(Linear(qkv, qkv_bias), Linear(output, output_bias), self._qk_norm(prefix), sinks)

    def dense(self, layer: int) -> GatedFeedForward:
        """The feed-forward network of a layer without experts."""
        return self._feed_forward(f"model.layers.{layer}.mlp.", self._spec.dense_intermediate_size)

    def shared_expert(self, layer: int) -> SharedExpert | None:
        """The expert that every token passes, in families that have one."""
        if not self._spec.shared_expert_size:
            return None
        prefix = f"{self._spec.moe_prefix.format(layer=layer)}{self._spec.shared_expert}"
        network = self._feed_forward(f"{prefix}.", self._spec.shared_expert_size)
        if not self._spec.shared_expert_gate:
            return SharedExpert(network)
        return SharedExpert(network, self.read(f"{prefix}_gate.weight", 1, self._spec.hidden_size))

    def _feed_forward(self, prefix: str, intermediate_size: int) -> GatedFeedForward:
        shape = (intermediate_size, self._spec.hidden_size)
        gate_up = torch.cat([self.read(f"{prefix}{part}.weight", *shape) for part in ("gate_proj", "up_proj")])
        down = self.read(f"{prefix}down_proj.weight", *reversed(shape))
        return GatedFeedForward(Linear(gate_up), Linear(down), self._spec.experts.activation)

    def _qk_norm(self, prefix: str) -> Tensor | None:
        """The scales of queries and keys as `[heads + kv_heads, head_dim]`, whatever the config's kind of norm."""
        spec = self._spec
        if spec.qk_norm == "none":
            return None
        scales = []
        for name, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads)):
            stored = spec.head_dim if spec.qk_norm == "head" else heads * spec.head_dim
            scale = self.read(f"{prefix}.{name}.weight", stored)
            scales.append(scale.view(-1, spec.head_dim).expand(heads, spec.head_dim))
        return torch.cat(scales)
