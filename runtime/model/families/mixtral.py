"""Mixtral: plain grouped-query attention; the gate's weights are renormalized and stay float32."""

from __future__ import annotations

from ..spec import DecoderSpec, ExpertSpec, GateSpec
from .common import FamilyInput, activation, common_fields, num_experts


def read(source: FamilyInput) -> DecoderSpec:
    """The spec of a `mixtral` checkpoint. Raises ConfigurationError."""
    config, common = source.config, common_fields(source, norm_eps=1e-5, rope_theta=1_000_000.0)
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    experts = ExpertSpec(
        num_experts=num_experts(config),
        hidden_size=common["hidden_size"],
        intermediate_size=config.integer("intermediate_size"),
        activation=activation(config),
        moe_layers=tuple(range(common["num_layers"])),
        gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    )
    return DecoderSpec(
        **common,
        experts=experts,
        renormalize=True,
        gate=GateSpec(rounds_weights=False),
        sliding_windows=(window,) * common["num_layers"],
        moe_prefix="model.layers.{layer}.block_sparse_moe.",
    )
