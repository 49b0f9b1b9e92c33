"""What a checkpoint needs to be computed, as frozen values: no tensors, no files, no torch.

`families.read_spec` makes one from a checkpoint. Every process of an application (router, expert groups) reads
the same folder and so holds the same spec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .expert_spec import ACTIVATIONS, Activation, ExpertSpec, GatedNames, StackedNames, StackedSpec
from .spec_checks import among, positive, wrong

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "Activation",
    "DecoderSpec",
    "ExpertSpec",
    "GateSpec",
    "GatedNames",
    "LatentSpec",
    "LayerSpec",
    "ModelSpec",
    "RopeSpec",
    "StackedNames",
    "StackedSpec",
]

DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al., arXiv 2104.09864) and how it is stretched to longer contexts.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" and "yarn" (arXiv 2309.00071) only low ones.
        attention_factor: multiplies cosine and sine.
        original_max_tokens: the context before stretching; "llama3" and "yarn" only.
    """

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    attention_factor: float = 1.0
    original_max_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        positive(self, "theta", "factor", "attention_factor")
        among(self, "kind", ("default", "linear", "llama3", "yarn"))
        if self.kind in ("llama3", "yarn"):
            positive(self, "original_max_tokens")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise wrong(self, "low_freq_factor", f"above 0 and below high_freq_factor {self.high_freq_factor}")


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How tokens choose their experts, beyond `DecoderSpec.top_k` and `renormalize`.

    Attributes:
        name: the gate's name behind `DecoderSpec.moe_prefix`; its matrix is `<name>.weight`.
        kind: "softmax" over all experts, then the best ones (`strategies.TopKSoftmax`); "softmax_of_top_k", the
            best ones, then a softmax over them, with a bias `<name>.bias` (`strategies.SoftmaxOfTopK`);
            "group_limited" (`grouped.GroupLimitedTopK`).
        rounds_weights: whether the weights are rounded to the model's dtype; "softmax" only.
        scores, correction_bias, groups, top_groups, scaling: of `grouped.GroupLimitedTopK`; the bias is
            `<name>.e_score_correction_bias`.
    """

    name: str = "gate"
    kind: Literal["softmax", "softmax_of_top_k", "group_limited"] = "softmax"
    rounds_weights: bool = True
    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0

    def __post_init__(self) -> None:
        among(self, "kind", ("softmax", "softmax_of_top_k", "group_limited"))
        among(self, "scores", ("softmax", "sigmoid"))
        positive(self, "groups", "scaling")
        if not 1 <= self.top_groups <= self.groups:
            raise wrong(self, "top_groups", f"1 to groups {self.groups}")

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ConfigurationError where the groups cannot hold `top_k` of `num_experts` experts."""
        if num_experts % self.groups:
            raise wrong(self, "groups", f"a divisor of num_experts {num_experts}")
        if num_experts // self.groups * self.top_groups < top_k:
            raise wrong(self, "top_groups", f"enough groups of {num_experts // self.groups} experts for {top_k}")


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention: keys and values of all heads are projections of one small vector per token, and
    only that is cached (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        kv_rank: size of that vector.
        query_rank: the queries go through a vector of this size too; None without one.
        plain_dim: dimensions of a head's queries and keys that no position turns.
        rope_dim: those that the position turns; their keys are shared by all heads.
        value_dim: of a head's values.
        interleaved: whether the turned dimensions are stored as pairs side by side, not half against half.
    """

    kv_rank: int
    query_rank: int | None
    plain_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool

    def __post_init__(self) -> None:
        positive(self, "kv_rank", "plain_dim", "rope_dim", "value_dim")
        if self.query_rank is not None:
            positive(self, "query_rank")
        if self.rope_dim % 2:
            raise wrong(self, "rope_dim", "an even number, as rotary embeddings turn pairs")


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Everything that the trunk of a decoder needs to know.

    Attributes:
        family: the config's `model_type`.
        max_context_tokens: prompt and generated tokens together.
        dtype: the config's, or that of the stored tensors: "float32", "bfloat16" or "float16".
        gate: how experts are chosen.
        head_dim: of a query and a key; with `latent`, `plain_dim + rope_dim` of it.
        latent: set for multi-head latent attention. `num_kv_heads`, `qk_norm` and `clip_qkv` do not count then.
        softmax_scale: factor of the attention scores; 0 for the usual `head_dim ** -0.5`.
        attention_sinks: each head has a logit of its own, `self_attn.sinks`, in its softmax, with nothing to read
            there (arXiv 2309.17453, as in gpt-oss).
        qk_norm: RMS norm of queries and keys: none, over each head, or over the whole projection.
        clip_qkv: queries, keys and values are clamped to plus and minus this.
        sliding_windows: per layer, how many tokens a token sees, itself included; None sees all before it.
        dense_intermediate_size: of the layers that are not in `experts.moe_layers`; 0 where there are none.
        shared_expert_size: intermediate size of the expert that every token passes; 0 without one.
        shared_expert: its name behind `moe_prefix`.
        shared_expert_gate: whether it is weighted by a gate of its own, `<name>_gate`.
        moe_prefix: what stands before the gate's and the shared expert's names, with the field `{layer}`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    norm_eps: float
    dtype: str
    rope: RopeSpec
    top_k: int
    renormalize: bool
    experts: ExpertSpec
    gate: GateSpec = GateSpec()
    latent: LatentSpec | None = None
    softmax_scale: float = 0.0
    attention_sinks: bool = False
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None
    sliding_windows: tuple[int | None, ...] = ()
    dense_intermediate_size: int = 0
    shared_expert_size: int = 0
    shared_expert: str = "shared_expert"
    shared_expert_gate: bool = True
    eos_token_ids: tuple[int, ...] = ()
    moe_prefix: str = "model.layers.{layer}.mlp."

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        positive(self, "max_context_tokens", "norm_eps", "top_k")
        among(self, "dtype", DTYPES)
        among(self, "qk_norm", ("none", "head", "full"))
        if self.num_heads % self.num_kv_heads:
            raise wrong(self, "num_heads", f"a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rotary_dim % 2:
            raise wrong(self, "head_dim", "an even number, as rotary embeddings turn pairs")
        if self.latent is not None and self.head_dim != self.latent.plain_dim + self.latent.rope_dim:
            raise wrong(self, "head_dim", "the sum of the latent attention's plain_dim and rope_dim")
        if not self.softmax_scale:
            object.__setattr__(self, "softmax_scale", 1 / math.sqrt(self.head_dim))
        if self.top_k > self.experts.num_experts:
            raise wrong(self, "top_k", f"at most num_experts {self.experts.num_experts}")
        self.gate.check(self.experts.num_experts, self.top_k)
        if self.experts.moe_layers[-1] >= self.num_layers:
            raise wrong(self, "num_layers", f"above every one of the MoE layers {self.experts.moe_layers}")
        if self.dense_layers:
            positive(self, "dense_intermediate_size")
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        if len(self.sliding_windows) != self.num_layers or any(
            w is not None and w < 1 for w in self.sliding_windows
        ):
            raise wrong(self, "sliding_windows", f"{self.num_layers} windows above 0, or None")

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers with one feed-forward network instead of experts."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.experts.moe_layers)))

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that positions turn."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def cached_heads(self) -> int:
        """Heads whose keys the KV cache holds."""
        return self.num_kv_heads if self.latent is None else 1

    @property
    def cached_key_dim(self) -> int:
        """Numbers per cached key."""
        return self.head_dim if self.latent is None else self.latent.kv_rank + self.latent.rope_dim

    @property
    def cached_value_dim(self) -> int:
        """Numbers per cached value; 0 where the values are the first numbers of the keys."""
        return self.head_dim if self.latent is None else 0

    def gate_name(self, layer: int) -> str:
        """The name of a layer's gate matrix `[experts, hidden]`."""
        return f"{self.moe_prefix.format(layer=layer)}{self.gate.name}.weight"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A checkpoint of one MoE layer: a gate and experts, nothing else (see `layer_model`)."""

    hidden_size: int
    top_k: int
    renormalize: bool
    dtype: str
    experts: ExpertSpec
    gate: str = "gate.weight"
    family: str = "pimoe_layer"

    def __post_init__(self) -> None:
        positive(self, "hidden_size", "top_k")
        among(self, "dtype", DTYPES)
        if self.top_k > self.experts.num_experts:
            raise wrong(self, "top_k", f"at most num_experts {self.experts.num_experts}")


ModelSpec = DecoderSpec | LayerSpec
