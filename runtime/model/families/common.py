"""What the config.json files of all families share: shapes, dtype, end tokens, rotary embedding, refusals."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypedDict

from ...errors import ConfigurationError
from ..config_fields import ConfigFields
from ..spec import Activation, RopeSpec

# Spellings of Hugging Face's `hidden_act`; "gelu_new" is the tanh approximation too.
ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPE_NAMES: dict[str, str] = {
    name: name.removeprefix("torch.")
    for dtype in ("float32", "bfloat16", "float16")
    for name in (dtype, f"torch.{dtype}")
}
# Fields of other architectures, and of variants of ours, that would change numbers -> their values for "off".
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": ({},),
    "attn_logit_softcapping": (0, 0.0),
    "final_logit_softcapping": (0, 0.0),
    "router_logit_softcapping": (0, 0.0),
    "attention_multiplier": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "query_pre_attn_scalar": (),
    "partial_rotary_factor": (1, 1.0),
    "attention_sinks": (False,),
    "alibi": (False,),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1, 1.0),
    "scoring_func": ("softmax",),
    "zero_expert_num": (0,),
    "mlp_bias": (False,),
}


class CommonFields(TypedDict):
    """The arguments of `DecoderSpec` that every family reads alike."""

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
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FamilyInput:
    """What a family reads from.

    Attributes:
        config: the config.json.
        generation: the generation_config.json, empty where there is none.
        stored_dtype: the dtype of the stored weights, for configs that name none.
    """

    config: ConfigFields
    generation: ConfigFields
    stored_dtype: str


def common_fields(
    source: FamilyInput, norm_eps: float, rope_theta: float = 10_000.0, handled: Collection[str] = ()
) -> CommonFields:
    """The fields read alike by every family.

    Args:
        norm_eps, rope_theta: the family's defaults.
        handled: fields of `REFUSED` that the family reads itself.

    Raises:
        ConfigurationError: a field is missing, malformed, or would change numbers and is not implemented.
    """
    config = source.config
    config.refuse({name: harmless for name, harmless in REFUSED.items() if name not in handled})
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    trained_tokens = config.integer("max_position_embeddings")
    rope = read_rope(config, trained_tokens, rope_theta)
    ends = source.generation.integers("eos_token_id") + config.integers("eos_token_id")
    return CommonFields(
        family=config.text("model_type"),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", default=num_heads),
        head_dim=config.integer("head_dim", default=max(1, hidden_size // num_heads)),
        max_context_tokens=_context_tokens(trained_tokens, rope),
        norm_eps=config.number("rms_norm_eps", default=norm_eps),
        dtype=config.choice("dtype", "torch_dtype", options=DTYPE_NAMES, default=source.stored_dtype),
        rope=rope,
        top_k=config.integer("num_experts_per_tok"),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        eos_token_ids=tuple(dict.fromkeys(ends)),
    )


def _context_tokens(trained_tokens: int, rope: RopeSpec) -> int:
    """YaRN is often switched on by adding `rope_scaling` to a config and nothing else (Qwen's model cards say so),
    and then stretches further than `max_position_embeddings` says."""
    if rope.kind == "yarn" and rope.original_max_tokens < trained_tokens:
        return max(trained_tokens, int(rope.factor * rope.original_max_tokens))
    return trained_tokens


def activation(config: ConfigFields) -> Activation:
    """The activation of experts and dense layers. Raises ConfigurationError for one that pimoe lacks."""
    name = config.text("hidden_act", default="silu")
    if name not in ACTIVATION_NAMES:
        raise config.error("hidden_act", name, f"one of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def num_experts(config: ConfigFields) -> int:
    """The number of experts of each MoE layer, under either of its spellings."""
    return config.integer("num_experts", "num_local_experts")


def count(config: ConfigFields, name: str, default: int) -> int:
    """A whole number, 0 included."""
    values = config.integers(name)
    if len(values) > 1:
        raise config.error(name, values, "a whole number")
    return values[0] if values else default


def fp8_block(config: ConfigFields) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a checkpoint of FP8 weights; None where nothing is quantized.

    Raises:
        ConfigurationError: any other quantization.
    """
    values = config.get("quantization_config")
    if not values:
        return None
    quantization = ConfigFields(
        values if isinstance(values, dict) else {}, f"{config.source}: quantization_config"
    )
    block = quantization.integers("weight_block_size")
    if quantization.get("quant_method") != "fp8" or len(block) != 2 or min(block) < 1:
        raise ConfigurationError(
            f"{config.source}: quantization_config = {values!r} is not supported by pimoe, which reads 'fp8' with "
            f"a weight_block_size of two numbers",
            "quantization_config",
        )
    return block[0], block[1]


def sliding_layers(config: ConfigFields, num_layers: int) -> list[bool] | None:
    """Which layers attend to a sliding window, by `layer_types`; None where the config has none."""
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    known = {"full_attention", "sliding_attention"}
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= known or len(kinds) != num_layers:
        raise config.error("layer_types", kinds, f"{num_layers} of full_attention, sliding_attention")
    return [kind == "sliding_attention" for kind in kinds]


def sparse_layers(config: ConfigFields, num_layers: int) -> tuple[int, ...]:
    """The layers that have experts: every `decoder_sparse_step`-th, less those in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = set(config.integers("mlp_only_layers"))
    return tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)


def rope_fields(config: ConfigFields) -> ConfigFields:
    """The object that says how positions are stretched, under either of its spellings."""
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, dict):
        raise config.error("rope_parameters", values, "an object")
    return ConfigFields(values, f"{config.source}: rope_parameters")


def read_rope(config: ConfigFields, max_context_tokens: int, default_theta: float) -> RopeSpec:
    """The rotary embedding: `rope_theta` and `rope_scaling`, or both inside `rope_parameters`.

    Raises:
        ConfigurationError: a kind that pimoe lacks ("dynamic", "longrope", ...) or malformed parameters.
    """
    rope = rope_fields(config)
    kind = rope.text("rope_type", "type", default="default")
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=default_theta))
    rope.refuse({"partial_rotary_factor": (1, 1.0), "mrope_section": ()})
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise ConfigurationError(f"{rope.source}: one rotary embedding per kind of layer is not supported")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec("linear", theta, rope.number("factor"))
    # Only these two read it, and transformers lets a field of that name outside the object win.
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original_max_tokens = max_context_tokens if original is None else int(original)
    if kind == "llama3":
        return _llama3(rope, theta, original_max_tokens)
    if kind == "yarn":
        return _yarn(rope, theta, original_max_tokens, max_context_tokens)
    raise rope.error("rope_type", kind, "one of default, linear, llama3, yarn")


def _llama3(rope: ConfigFields, theta: float, original_max_tokens: int) -> RopeSpec:
    return RopeSpec(
        "llama3",
        theta,
        rope.number("factor"),
        original_max_tokens=original_max_tokens,
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
    )


def _yarn(rope: ConfigFields, theta: float, original_max_tokens: int, max_context_tokens: int) -> RopeSpec:
    factor = rope.number("factor", default=max_context_tokens / original_max_tokens)
    scale, scale_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if scale and scale_all:
        attention_factor = yarn_magnitude(factor, scale) / yarn_magnitude(factor, scale_all)
    else:
        attention_factor = yarn_magnitude(factor, 1.0)
    return RopeSpec(
        "yarn",
        theta,
        factor,
        attention_factor=rope.number("attention_factor", default=attention_factor),
        original_max_tokens=original_max_tokens,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
    )


def yarn_magnitude(factor: float, scale: float) -> float:
    """What YaRN multiplies with where the context is stretched by `factor` (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
