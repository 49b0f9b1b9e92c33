"""`pimoe_layer`: one MoE layer without a decoder around it (see `layer_model`)."""

from __future__ import annotations

from ..spec import ExpertSpec, LayerSpec
from .common import DTYPE_NAMES, FamilyInput, activation, num_experts


def read(source: FamilyInput) -> LayerSpec:
    """The spec of a `pimoe_layer` checkpoint. Raises ConfigurationError."""
    config = source.config
    custom_class = config.get("expert_class") and config.text("expert_class")
    custom_kwargs = config.get("expert_kwargs") or {}
    if not isinstance(custom_kwargs, dict):
        raise config.error("expert_kwargs", custom_kwargs, "an object of keyword arguments")
    experts = ExpertSpec(
        num_experts=num_experts(config),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=0 if custom_class else config.integer("intermediate_size"),
        activation=activation(config),
        moe_layers=(0,),
        gate="experts.{expert}.gate_proj.weight",
        up="experts.{expert}.up_proj.weight",
        down="experts.{expert}.down_proj.weight",
        custom_class=custom_class,
        custom_kwargs=custom_kwargs,
        custom_prefix="experts.{expert}.",
    )
    return LayerSpec(
        hidden_size=experts.hidden_size,
        top_k=config.integer("num_experts_per_tok"),
        renormalize=config.flag("norm_topk_prob", default=True),
        dtype=config.choice("dtype", "torch_dtype", options=DTYPE_NAMES, default=source.stored_dtype),
        experts=experts,
    )
