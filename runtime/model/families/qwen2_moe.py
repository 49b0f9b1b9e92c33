"""Qwen2-MoE: biased queries, keys and values, and an expert that every token passes, behind a sigmoid gate."""

from __future__ import annotations

from ..config_fields import ConfigFields
from ..spec import DecoderSpec, ExpertSpec
from .common import FamilyInput, activation, common_fields, num_experts, sliding_layers, sparse_layers


def read(source: FamilyInput) -> DecoderSpec:
    """The spec of a `qwen2_moe` checkpoint. Raises ConfigurationError."""
    config, common = source.config, common_fields(source, norm_eps=1e-6)
    experts = ExpertSpec(
        num_experts=num_experts(config),
        hidden_size=common["hidden_size"],
        intermediate_size=config.integer("moe_intermediate_size"),
        activation=activation(config),
        moe_layers=sparse_layers(config, common["num_layers"]),
        gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    )
    return DecoderSpec(
        **common,
        experts=experts,
        renormalize=config.flag("norm_topk_prob", default=False),
        qkv_bias=config.flag("qkv_bias", default=True),
        sliding_windows=_sliding_windows(config, common["num_layers"]),
        dense_intermediate_size=config.integer("intermediate_size"),
        shared_expert_size=config.integer("shared_expert_intermediate_size"),
    )


def _sliding_windows(config: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """`layer_types` where given, else every second one of the first `max_window_layers`, as transformers does."""
    used = config.flag("use_sliding_window", default=False)
    sliding = sliding_layers(config, num_layers)
    if sliding is None:
        below = config.integer("max_window_layers", default=28) if used else 0
        sliding = [layer % 2 == 0 and layer < below for layer in range(num_layers)]
    if any(sliding) and not used:
        raise config.error("use_sliding_window", used, "true, since layer_types names sliding_attention")
    window = config.integer("sliding_window", default=4096) if any(sliding) else None
    return tuple(window if slides else None for slides in sliding)
