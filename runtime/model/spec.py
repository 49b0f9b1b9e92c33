"""What a checkpoint needs to be computed, as frozen values: no tensors, no files, no torch.

`families.read_spec` makes one from a checkpoint. Every process of an application (router, expert groups) reads
the same folder and so holds the same spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..errors import ConfigurationError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")


class GatedNames(NamedTuple):
    """The tensor names of one gated expert: `down(act(gate(x)) * up(x))`."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """What an expert group needs to know of the model.

    Attributes:
        intermediate_size: rows of `gate` and `up`; 0 for custom experts.
        activation: of gated experts; "silu" for custom ones, where nobody reads it.
        moe_layers: indices of the layers that have experts, ascending.
        gate, up, down: tensor names of gated experts, with the fields `{layer}` and `{expert}`.
        custom_class: import path "package.module:Class" of an nn.Module `[tokens, hidden] -> [tokens, hidden]`;
            None for gated experts.
        custom_kwargs: keyword arguments of that class.
        custom_prefix: what stands before the class's own parameter names, with the same two fields.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    moe_layers: tuple[int, ...]
    gate: str = ""
    up: str = ""
    down: str = ""
    custom_class: str | None = None
    custom_kwargs: Mapping[str, Any] = field(default_factory=dict)
    custom_prefix: str = ""

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "hidden_size")
        _among(self, "activation", ACTIVATIONS)
        if not self.moe_layers or list(self.moe_layers) != sorted(set(self.moe_layers)):
            raise _wrong(self, "moe_layers", "at least one layer index, ascending")
        if self.custom_class is None:
            _positive(self, "intermediate_size")
            templates = [self.gate, self.up, self.down]
        else:
            templates = [self.custom_prefix]
        if any("{expert}" not in template for template in templates):
            raise ConfigurationError(f"ExpertSpec: every tensor name needs {{expert}}, got {templates}")

    def tensor_names(self, layer: int, expert: int) -> GatedNames:
        """The names of a gated expert's tensors: `[intermediate, hidden]` twice, then `[hidden, intermediate]`."""
        return GatedNames(*(name.format(layer=layer, expert=expert) for name in (self.gate, self.up, self.down)))

    def prefix(self, layer: int, expert: int) -> str:
        """What stands before the parameter names of a custom expert, such as "experts.3."."""
        return self.custom_prefix.format(layer=layer, expert=expert)


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
        _positive(self, "theta", "factor", "attention_factor")
        _among(self, "kind", ("default", "linear", "llama3", "yarn"))
        if self.kind in ("llama3", "yarn"):
            _positive(self, "original_max_tokens")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise _wrong(self, "low_freq_factor", f"above 0 and below high_freq_factor {self.high_freq_factor}")


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Everything that the trunk of a decoder needs to know.

    Attributes:
        family: the config's `model_type`.
        max_context_tokens: prompt and generated tokens together.
        dtype: the config's, or that of the stored tensors: "float32", "bfloat16" or "float16".
        round_gate_weights: whether the gate's weights are rounded to the model's dtype.
        qk_norm: RMS norm of queries and keys: none, over each head, or over the whole projection.
        clip_qkv: queries, keys and values are clamped to plus and minus this.
        sliding_windows: per layer, how many tokens a token sees, itself included; None sees all before it.
        dense_intermediate_size: of the layers that are not in `experts.moe_layers`; 0 where there are none.
        shared_expert_size: intermediate size of the expert that every token passes; 0 without one.
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
    round_gate_weights: bool = True
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None
    sliding_windows: tuple[int | None, ...] = ()
    dense_intermediate_size: int = 0
    shared_expert_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    moe_prefix: str = "model.layers.{layer}.mlp."

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        _positive(self, "max_context_tokens", "norm_eps", "top_k")
        _among(self, "dtype", DTYPES)
        _among(self, "qk_norm", ("none", "head", "full"))
        if self.num_heads % self.num_kv_heads:
            raise _wrong(self, "num_heads", f"a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise _wrong(self, "head_dim", "an even number, as rotary embeddings turn pairs")
        if self.top_k > self.experts.num_experts:
            raise _wrong(self, "top_k", f"at most num_experts {self.experts.num_experts}")
        if self.experts.moe_layers[-1] >= self.num_layers:
            raise _wrong(self, "num_layers", f"above every one of the MoE layers {self.experts.moe_layers}")
        if self.dense_layers:
            _positive(self, "dense_intermediate_size")
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        if len(self.sliding_windows) != self.num_layers or any(
            w is not None and w < 1 for w in self.sliding_windows
        ):
            raise _wrong(self, "sliding_windows", f"{self.num_layers} windows above 0, or None")

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers with one feed-forward network instead of experts."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.experts.moe_layers)))

    def gate_name(self, layer: int) -> str:
        """The name of a layer's gate matrix `[experts, hidden]`."""
        return f"{self.moe_prefix.format(layer=layer)}gate.weight"


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
        _positive(self, "hidden_size", "top_k")
        _among(self, "dtype", DTYPES)
        if self.top_k > self.experts.num_experts:
            raise _wrong(self, "top_k", f"at most num_experts {self.experts.num_experts}")


ModelSpec = DecoderSpec | LayerSpec


def _wrong(spec: object, name: str, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"{type(spec).__name__}: {name} = {getattr(spec, name)!r}; expected {expected}", name
    )


def _positive(spec: object, *names: str) -> None:
    for name in names:
        if not getattr(spec, name) > 0:
            raise _wrong(spec, name, "a number above 0")


def _among(spec: object, name: str, options: tuple[str, ...]) -> None:
    if getattr(spec, name) not in options:
        raise _wrong(spec, name, f"one of {', '.join(options)}")
