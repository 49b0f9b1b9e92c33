"""gpt-oss: attention sinks, sliding windows in every second layer, biases, experts with a clamped SwiGLU.

Published checkpoints hold the experts in MXFP4 (arXiv 2508.10925); they are made whole while they are read.
"""

from __future__ import annotations

from ...errors import ConfigurationError
from ..config_fields import ConfigFields
from ..spec import DecoderSpec, ExpertSpec, GateSpec, StackedSpec
from .common import FamilyInput, common_fields, num_experts, rope_fields, sliding_layers


def read(source: FamilyInput) -> DecoderSpec:
    """The spec of a `gpt_oss` checkpoint. Raises ConfigurationError."""
    config = source.config
    if not rope_fields(config).values:
        raise config.error("rope_parameters", None, "the rotary embedding")
    common = common_fields(source, norm_eps=1e-5, rope_theta=150_000.0, handled=("quantization_config",))
    experts = ExpertSpec(
        num_experts=num_experts(config),
        hidden_size=common["hidden_size"],
        intermediate_size=config.integer("intermediate_size"),
        activation="silu",
        moe_layers=tuple(range(common["num_layers"])),
        stacked=StackedSpec(
            prefix="model.layers.{layer}.mlp.experts.",
            alpha=config.number("swiglu_alpha", default=1.702),
            limit=config.number("swiglu_limit", default=7.0),
            mxfp4=_is_mxfp4(config),
        ),
    )
    bias = config.flag("attention_bias", default=True)  # of all four projections
    return DecoderSpec(
        **common,
        experts=experts,
        renormalize=True,
        gate=GateSpec(name="router", kind="softmax_of_top_k"),
        qkv_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        sliding_windows=_windows(config, common["num_layers"]),
    )


def _windows(config: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    sliding = sliding_layers(config, num_layers) or [layer % 2 == 0 for layer in range(num_layers)]
    window = config.integer("sliding_window", default=128)
    return tuple(window if slides else None for slides in sliding)


def _is_mxfp4(config: ConfigFields) -> bool:
    values = config.get("quantization_config")
    if not values:
        return False
    if isinstance(values, dict) and values.get("quant_method") == "mxfp4":
        return True
    raise ConfigurationError(
        f"{config.source}: quantization_config = {values!r} is not supported by pimoe, which reads 'mxfp4' here",
        "quantization_config",
    )
