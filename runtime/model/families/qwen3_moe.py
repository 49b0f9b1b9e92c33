"""Qwen3-MoE: queries and keys normed head by head."""

from __future__ import annotations

from ..spec import DecoderSpec, ExpertSpec
from .common import FamilyInput, activation, common_fields, fp8_block, num_experts, sparse_layers


def read(source: FamilyInput) -> DecoderSpec:
    """The spec of a `qwen3_moe` checkpoint. Raises ConfigurationError."""
    config, common = source.config, common_fields(source, norm_eps=1e-6, handled=("quantization_config",))
    window = (
        config.integer("sliding_window", default=4096)
        if config.flag("use_sliding_window", default=False)
        else None
    )
    experts = ExpertSpec(
        num_experts=num_experts(config),
        hidden_size=common["hidden_size"],
        intermediate_size=config.integer("moe_intermediate_size"),
        activation=activation(config),
        moe_layers=sparse_layers(config, common["num_layers"]),
        gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        fp8_block=fp8_block(config),
    )
    bias = config.flag("attention_bias", default=False)  # of all four projections
    return DecoderSpec(
        **common,
        experts=experts,
        renormalize=config.flag("norm_topk_prob", default=False),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        sliding_windows=(window,) * common["num_layers"],
        dense_intermediate_size=config.integer("intermediate_size"),
    )
