"""OLMoE: queries and keys normed over the whole projection, then clipped where the config says so."""

from __future__ import annotations

from ..spec import DecoderSpec, ExpertSpec
from .common import FamilyInput, activation, common_fields, num_experts


def read(source: FamilyInput) -> DecoderSpec:
    """The spec of an `olmoe` checkpoint. Raises ConfigurationError."""
    config, common = source.config, common_fields(source, norm_eps=1e-5)
    experts = ExpertSpec(
        num_experts=num_experts(config),
        hidden_size=common["hidden_size"],
        intermediate_size=config.integer("intermediate_size"),
        activation=activation(config),
        moe_layers=tuple(range(common["num_layers"])),
        gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    )
    bias = config.flag("attention_bias", default=False)
    return DecoderSpec(
        **common,
        experts=experts,
        renormalize=config.flag("norm_topk_prob", default=False),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="full",
        clip_qkv=config.optional_number("clip_qkv"),
    )
