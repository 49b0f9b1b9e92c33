"""DeepSeek-V2 and DeepSeek-V3: latent attention, experts that every token passes, group-limited routing.

V2 (arXiv 2405.04434) scores experts by a softmax, V3 (arXiv 2412.19437) by sigmoids with a bias that balances
them. What a V3 checkpoint holds for predicting more than one token ahead, as layers behind the last, is not read.
"""

from __future__ import annotations

import math

from ..config_fields import ConfigFields
from ..spec import DecoderSpec, ExpertSpec, GateSpec, LatentSpec, RopeSpec
from .common import FamilyInput, activation, common_fields, count, fp8_block, rope_fields, yarn_magnitude

_HANDLED = ("n_group", "topk_group", "routed_scaling_factor", "scoring_func", "quantization_config")
_ONE_LAYER_IN = {"moe_layer_freq": (1,)}  # transformers has no others


def read_v2(source: FamilyInput) -> DecoderSpec:
    """The spec of a `deepseek_v2` checkpoint. Raises ConfigurationError."""
    config = source.config
    # The published code and transformers disagree on a renormalizing V2; no published checkpoint is one.
    config.refuse({**_ONE_LAYER_IN, "norm_topk_prob": (False,), "scoring_func": ("softmax",)})
    method = config.text("topk_method", default="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise config.error("topk_method", method, "greedy or group_limited_greedy")
    limited = method == "group_limited_greedy"
    gate = GateSpec(
        kind="group_limited",
        groups=config.integer("n_group") if limited else 1,
        top_groups=config.integer("topk_group") if limited else 1,
        scaling=config.number("routed_scaling_factor", default=1.0),
    )
    return _read(source, gate, renormalize=False, interleaved=True, dense_layers=0, shared_experts=2)


def read_v3(source: FamilyInput) -> DecoderSpec:
    """The spec of a `deepseek_v3` checkpoint. Raises ConfigurationError."""
    config = source.config
    config.refuse({**_ONE_LAYER_IN, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)})
    gate = GateSpec(
        kind="group_limited",
        scores="sigmoid",
        correction_bias=True,
        groups=config.integer("n_group", default=8),
        top_groups=config.integer("topk_group", default=4),
        scaling=config.number("routed_scaling_factor", default=2.5),
    )
    renormalize = config.flag("norm_topk_prob", default=True)
    interleaved = config.flag("rope_interleave", default=True)
    return _read(source, gate, renormalize, interleaved, dense_layers=3, shared_experts=1)


def _read(
    source: FamilyInput,
    gate: GateSpec,
    renormalize: bool,
    interleaved: bool,
    dense_layers: int,
    shared_experts: int,
) -> DecoderSpec:
    """What both have; the numbers of layers and experts are the defaults."""
    config, common = source.config, common_fields(source, norm_eps=1e-6, handled=_HANDLED)
    latent = _latent(config, interleaved)
    common["head_dim"] = latent.plain_dim + latent.rope_dim
    common["num_kv_heads"] = common["num_heads"]
    bias = config.flag("attention_bias", default=False)
    experts = ExpertSpec(
        num_experts=config.integer("n_routed_experts", "num_local_experts", "num_experts"),
        hidden_size=common["hidden_size"],
        intermediate_size=config.integer("moe_intermediate_size"),
        activation=activation(config),
        moe_layers=tuple(range(count(config, "first_k_dense_replace", dense_layers), common["num_layers"])),
        gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        fp8_block=fp8_block(config),
    )
    return DecoderSpec(
        **common,
        experts=experts,
        renormalize=renormalize,
        gate=gate,
        latent=latent,
        softmax_scale=_softmax_scale(config, common["rope"], common["head_dim"]),
        qkv_bias=bias,
        output_bias=bias,
        dense_intermediate_size=config.integer("intermediate_size"),
        shared_expert_size=count(config, "n_shared_experts", shared_experts) * experts.intermediate_size,
        shared_expert="shared_experts",
        shared_expert_gate=False,
    )


def _latent(config: ConfigFields, interleaved: bool) -> LatentSpec:
    return LatentSpec(
        kv_rank=config.integer("kv_lora_rank"),
        query_rank=None if config.get("q_lora_rank") is None else config.integer("q_lora_rank"),
        plain_dim=config.integer("qk_nope_head_dim"),
        rope_dim=config.integer("qk_rope_head_dim"),
        value_dim=config.integer("v_head_dim"),
        interleaved=interleaved,
    )


def _softmax_scale(config: ConfigFields, rope: RopeSpec, head_dim: int) -> float:
    """YaRN's temperature is applied here to whole queries and keys, and not only to the dimensions that turn."""
    scale_all = rope_fields(config).optional_number("mscale_all_dim")
    if rope.kind == "default" or not scale_all:
        return 1.0 / math.sqrt(head_dim)
    return yarn_magnitude(rope.factor, scale_all) ** 2 / math.sqrt(head_dim)
