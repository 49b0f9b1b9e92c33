"""Configs to specs: both spellings, defaults, and everything that must be refused rather than computed wrongly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, edit_config, make_checkpoint, reference_model
from pimoe.runtime.errors import CheckpointError, ConfigurationError, UnknownFamilyError
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.decoder import Decoder
from pimoe.runtime.model.families import FAMILIES as KNOWN
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.safetensors_header import read_header
from pimoe.runtime.model.spec import (
    DecoderSpec,
    ExpertSpec,
    GatedNames,
    GateSpec,
    LayerSpec,
    RopeSpec,
    StackedSpec,
)
from pimoe.runtime.requests import InferRequest
from pimoe.runtime.tensors import from_wire, to_wire
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path)


def decoder_spec(folder: Path) -> DecoderSpec:
    spec = read_spec(Checkpoint(folder))
    assert isinstance(spec, DecoderSpec)
    return spec


def experts(**changes: Any) -> ExpertSpec:
    values: dict[str, Any] = {
        "num_experts": 4,
        "hidden_size": 8,
        "intermediate_size": 16,
        "activation": "silu",
        "moe_layers": (0, 2),
        "gate": "layers.{layer}.experts.{expert}.w1",
        "up": "layers.{layer}.experts.{expert}.w3",
        "down": "layers.{layer}.experts.{expert}.w2",
    }
    return ExpertSpec(**{**values, **changes})


def decoder(**changes: Any) -> DecoderSpec:
    values: dict[str, Any] = {
        "family": "test",
        "vocab_size": 32,
        "hidden_size": 8,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "max_context_tokens": 64,
        "norm_eps": 1e-6,
        "dtype": "float32",
        "rope": RopeSpec(),
        "top_k": 2,
        "renormalize": True,
        "experts": experts(),
        "dense_intermediate_size": 16,
    }
    return DecoderSpec(**{**values, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_tensor_is_where_the_spec_says(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_checkpoint(family, tmp_path))
    spec = read_spec(checkpoint).experts
    stored = {name: shape for layer in spec.moe_layers for name, shape in spec.stored_shapes(layer).items()}
    assert stored == {name: checkpoint.shape(name) for name in checkpoint.names if ".experts." in name}
    numbers = sum(math.prod(shape) for shape in stored.values())
    assert numbers == spec.parameters_per_expert * spec.num_experts * len(spec.moe_layers)


def test_every_family_has_a_test_checkpoint() -> None:
    assert set(KNOWN) == {*FAMILIES, "pimoe_layer"}


def test_unknown_families_are_refused_with_the_known_ones(folder: Path) -> None:
    edit_config(folder, model_type="dbrx")
    with pytest.raises(UnknownFamilyError, match=r"unknown model_type 'dbrx'; known: deepseek_v2, deepseek_v3"):
        read_spec(Checkpoint(folder))
    edit_config(folder, ("model_type",))
    with pytest.raises(ConfigurationError, match="model_type is missing"):
        read_spec(Checkpoint(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "xielu"}, "hidden_act = 'xielu'; expected one of silu"),
        ({"hidden_size": "48"}, "hidden_size = '48'; expected a whole number above 0"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes'; expected true or false"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06; expected a number above 0"),
        ({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'; expected one of bfloat16"),
        ({"num_experts_per_tok": 7}, "top_k = 7; expected at most num_experts 6"),
        ({"num_key_value_heads": 3}, "num_heads = 4; expected a multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim = 15; expected an even number"),
        ({"mlp_only_layers": [0, 1, 2]}, r"moe_layers = \(\); expected at least one"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers = 'all'"),
        ({"eos_token_id": "<end>"}, "eos_token_id = '<end>'; expected a whole number or a list"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .* is not supported"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'; expected one of"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one rotary embedding per kind of layer"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: the field factor is missing"),
        ({"rope_parameters": [1]}, "rope_parameters = .*; expected an object"),
    ],
)
def test_fields_that_would_change_numbers_are_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    edit_config(folder, **values)
    with pytest.raises(ConfigurationError, match=message):
        read_spec(Checkpoint(folder))


def test_harmless_values_of_refused_fields_pass(folder: Path) -> None:
    before = read_spec(Checkpoint(folder))
    edit_config(folder, attn_logit_softcapping=None, routed_scaling_factor=1.0, n_group=1, mlp_bias=False)
    assert read_spec(Checkpoint(folder)) == before


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'; expected greedy or group_limited"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group is missing"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ("deepseek_v2", {"first_k_dense_replace": 3}, r"moe_layers = \(\)"),
        ("deepseek_v2", {"first_k_dense_replace": [1, 2]}, r"first_k_dense_replace = \(1, 2\); expected a whole"),
        ("deepseek_v2", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported"),
        ("deepseek_v3", {"n_group": 4}, "groups = 4; expected a divisor of num_experts 6"),
        ("deepseek_v3", {"topk_group": 4}, "top_groups = 4; expected 1 to groups 3"),
        (
            "deepseek_v3",
            {"topk_group": 1, "num_experts_per_tok": 3},
            "top_groups = 1; expected enough groups of 2",
        ),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "rope_dim = 7; expected an even number"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types = .*; expected 3 of full_attention"),
        ("gpt_oss", {"layer_types": [["full_attention"]] * 3}, "layer_types"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit = 0; expected a number above 0"),
        ("gpt_oss", {"rope_parameters": None}, "rope_parameters = None; expected the rotary embedding"),
    ],
)
def test_fields_of_one_family_are_checked(
    family: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path)
    edit_config(folder, **values)
    with pytest.raises(ConfigurationError, match=message):
        read_spec(Checkpoint(folder))


PUBLISHED_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def test_fields_as_deepseek_v3_is_published(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path)
    edit_config(
        folder,
        ("dtype", "rope_parameters", "rope_interleave"),
        ep_size=1,
        max_position_embeddings=163840,
        moe_layer_freq=1,
        num_nextn_predict_layers=1,
        rope_scaling=PUBLISHED_YARN,
        rope_theta=10000,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        torch_dtype="bfloat16",
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    )
    spec = decoder_spec(folder)
    assert spec.experts.fp8_block == (128, 128)
    assert spec.max_context_tokens == 163840
    assert spec.rope.factor == 40.0
    assert spec.rope.attention_factor == 1.0
    assert spec.softmax_scale == pytest.approx(20**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert spec.gate == GateSpec(
        kind="group_limited", scores="sigmoid", correction_bias=True, groups=3, top_groups=2, scaling=2.5
    )
    assert spec.latent is not None
    assert spec.latent.interleaved
    assert (spec.rotary_dim, spec.cached_heads, spec.cached_key_dim, spec.cached_value_dim) == (8, 1, 28, 0)


def test_fields_as_deepseek_v2_lite_is_published(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v2", tmp_path)
    edit_config(
        folder,
        aux_loss_alpha=0.001,
        moe_layer_freq=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        routed_scaling_factor=1.0,
        rope_scaling={**PUBLISHED_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        scoring_func="softmax",
        seq_aux=True,
        topk_method="greedy",
    )
    spec = decoder_spec(folder)
    assert spec.latent is not None
    assert spec.latent.query_rank is None
    assert spec.gate == GateSpec(kind="group_limited")
    assert spec.shared_expert_size == 2 * 24


def test_fields_as_gpt_oss_is_published(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt_oss", tmp_path, hidden_size=64, intermediate_size=32)
    edit_config(
        folder,
        ("dtype", "rope_parameters", "swiglu_alpha"),
        experts_per_token=4,
        initial_context_length=4096,
        max_position_embeddings=131072,
        quantization_config={
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
            "quant_method": "mxfp4",
        },
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        rope_theta=150000,
        sliding_window=128,
        swiglu_limit=7.0,
    )
    spec = decoder_spec(folder)
    assert spec.experts.stacked == StackedSpec("model.layers.{layer}.mlp.experts.", 1.702, 7.0, mxfp4=True)
    assert spec.sliding_windows == (128, None, 128)
    assert spec.attention_sinks
    assert not spec.rope.truncate
    assert spec.max_context_tokens == 131072
    assert spec.gate.name == "router"


def test_dtype_is_that_of_the_first_tensor_that_is_computed_in(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt_oss", tmp_path, dtype="bfloat16")
    (folder / "model.safetensors").rename(folder / "two.safetensors")
    save_file({"blocks": torch.zeros(2, dtype=torch.uint8)}, folder / "one.safetensors")
    weight_map = {"blocks": "one.safetensors"}
    weight_map |= dict.fromkeys(read_header(folder / "two.safetensors").entries, "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edit_config(folder, ("dtype",))
    assert Checkpoint(folder).names[0] == "blocks"
    assert decoder_spec(folder).dtype == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
async def test_tensors_go_through_the_gate_and_routed_experts_of_one_layer(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    spec = decoder_spec(folder)
    hidden, layer = torch.randn(7, spec.hidden_size), spec.experts.moe_layers[-1]
    async with await LocalRuntime.start(folder, groups=2) as runtime:
        info = runtime.router.model
        assert (info.top_k, info.num_experts, info.moe_layers) == (spec.top_k, 6, spec.experts.moe_layers)
        result = await runtime.router.infer(InferRequest("r", to_wire(hidden), layer))
    mlp = reference_model(folder).model.layers[layer].mlp
    with torch.no_grad():
        _, weights, ids = (mlp.router if family == "gpt_oss" else mlp.gate)(hidden)
        expected = mlp.experts(hidden, ids, weights)
    torch.testing.assert_close(from_wire(result.output), expected, atol=1e-4, rtol=0)


def test_qwen2_sliding_layers_need_a_window(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2_moe", tmp_path)
    edit_config(folder, layer_types=["sliding_attention"] * 3)
    with pytest.raises(ConfigurationError, match="use_sliding_window = False; expected true"):
        read_spec(Checkpoint(folder))
    edit_config(folder, layer_types=["linear_attention"] * 3)
    with pytest.raises(ConfigurationError, match="layer_types"):
        read_spec(Checkpoint(folder))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, ()),
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (5, 5, (5,)),
        (5, [7, 5], (7, 5)),
        (None, [7], (7,)),
    ],
)
def test_end_tokens_of_both_files(folder: Path, config: Any, generation: Any, expected: tuple[int, ...]) -> None:
    edit_config(folder, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert decoder_spec(folder).eos_token_ids == expected


def test_dtype_comes_from_the_config_or_the_weights(tmp_path: Path) -> None:
    folder = make_checkpoint("olmoe", tmp_path, dtype="bfloat16")
    assert decoder_spec(folder).dtype == "bfloat16"
    edit_config(folder, ("dtype",))
    assert decoder_spec(folder).dtype == "bfloat16"
    edit_config(folder, torch_dtype="float16")
    assert decoder_spec(folder).dtype == "float16"
    assert Decoder.load(Checkpoint(folder), decoder_spec(folder)).dtype is torch.float16


def test_yarn_without_a_factor_takes_the_ratio_of_contexts(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 64})
    assert decoder_spec(folder).rope.factor == 4.0


def test_yarn_stretches_the_context(folder: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}
    assert decoder_spec(folder).max_context_tokens == 256
    edit_config(folder, rope_parameters=yarn)
    assert decoder_spec(folder).max_context_tokens == 800
    edit_config(folder, rope_parameters={**yarn, "original_max_position_embeddings": 32})
    assert decoder_spec(folder).max_context_tokens == 256


def test_missing_and_misshapen_tensors_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_norm.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        Decoder.load(Checkpoint(folder), decoder_spec(folder))
    save_file({**tensors, name: torch.ones(8)}, file)
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[8\], expected \[16\]"):
        Decoder.load(Checkpoint(folder), decoder_spec(folder))


def test_names_of_experts() -> None:
    spec = experts()
    assert spec.tensor_names(2, 3) == GatedNames(
        "layers.2.experts.3.w1", "layers.2.experts.3.w3", "layers.2.experts.3.w2"
    )
    custom = experts(custom_class="a:B", custom_prefix="experts.{expert}.", intermediate_size=0)
    assert custom.prefix(0, 3) == "experts.3."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts = 0"),
        ({"intermediate_size": 0}, "intermediate_size = 0"),
        ({"activation": "tanh"}, "activation = 'tanh'; expected one of silu"),
        ({"moe_layers": ()}, "moe_layers"),
        ({"moe_layers": (2, 0)}, "ascending"),
        ({"gate": "all.experts"}, "every tensor name needs {expert}"),
        ({"custom_class": "a:B"}, "every tensor name needs {expert}"),
    ],
)
def test_expert_specs_are_checked_when_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        experts(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "num_layers = 2; expected above every one of the MoE layers"),
        ({"dense_intermediate_size": 0}, "dense_intermediate_size = 0"),
        ({"sliding_windows": (None, 3)}, "sliding_windows .* expected 3 windows"),
        ({"sliding_windows": (None, 3, 0)}, "expected 3 windows above 0"),
        ({"qk_norm": "half"}, "qk_norm = 'half'; expected one of none, head, full"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
    ],
)
def test_decoder_specs_are_checked_when_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        decoder(**changes)


def test_decoder_spec_derives_what_follows() -> None:
    spec = decoder()
    assert spec.dense_layers == (1,)
    assert spec.sliding_windows == (None, None, None)
    assert spec.gate_name(2) == "model.layers.2.mlp.gate.weight"


def test_layer_and_rope_specs_are_checked_when_made() -> None:
    with pytest.raises(ConfigurationError, match="top_k = 5"):
        LayerSpec(hidden_size=8, top_k=5, renormalize=True, dtype="float32", experts=experts())
    with pytest.raises(ConfigurationError, match="original_max_tokens = 0"):
        RopeSpec("yarn", factor=2.0)
    with pytest.raises(ConfigurationError, match=r"low_freq_factor = 4\.0"):
        RopeSpec("llama3", factor=2.0, original_max_tokens=64, low_freq_factor=4.0)
