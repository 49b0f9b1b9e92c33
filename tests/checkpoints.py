"""Small random checkpoints of every family, written by transformers, for tests to read.

`make_checkpoint(family, folder, **overrides)` is the one entry; the overrides are fields of the transformers
config, and `initial_std` and `max_shard_size`. `reference_model(folder)` is the same model in transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils import logging

logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.set_verbosity_error()  # type: ignore[no-untyped-call]

FAMILIES = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "routed_scaling_factor": 1.3,
}
_BY_FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_DEEPSEEK, "n_shared_experts": 2},
    "deepseek_v3": {**_DEEPSEEK, "n_shared_experts": 1, "n_group": 3, "topk_group": 2},
    "gpt_oss": {
        "num_local_experts": 6,
        "head_dim": 16,
        "sliding_window": 6,
        "swiglu_limit": 0.8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
}


# Overrides with which a family's layers fit the native kernels; multi-head latent attention has none.
NATIVE_SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "initial_std": 0.12}


def make_checkpoint(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    initial_std: float = 0.2,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint of `family` into `folder` and returns it.

    The weights are wider than a training would start with (`initial_std`), so that logits differ well; norms
    and biases are random too, so that none can be forgotten unnoticed. No token ends a sequence.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **_BY_FAMILY[family], **overrides})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, initial_std)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, initial_std)
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def reference_model(folder: Path, **options: Any) -> PreTrainedModel:
    """The checkpoint in transformers, with its plain attention and plain experts."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager", **options}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def edit_config(folder: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    """Rewrites fields of the folder's config.json."""
    file = folder / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name not in remove}
    file.write_text(json.dumps({**config, **values}))


def as_old_spelling(folder: Path) -> None:
    """Rewrites config.json the way that transformers 4 wrote it."""
    config = json.loads((folder / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    old = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": config["dtype"]}
    if config["model_type"] == "qwen3_moe":
        old["num_experts"] = config["num_local_experts"]
        edit_config(folder, ("num_local_experts",))
    edit_config(folder, ("rope_parameters", "dtype"), **old)


def as_fp8(folder: Path, exact: Path, block: tuple[int, int] = (16, 12)) -> None:
    """Rewrites the projections in `folder` as FP8 with a scale per block, as DeepSeek-V3 is published, and writes
    into `exact` the checkpoint with the same numbers in float32."""
    stored: dict[str, torch.Tensor] = {}
    same: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = same[name] = tensor
        if not name.endswith("_proj.weight") and not name.endswith("_proj_with_mqa.weight"):
            continue
        rows, columns = tensor.shape
        shape = (-(-rows // block[0]), -(-columns // block[1]))
        scales = torch.rand(shape) * 2e-3 + 1e-3
        spread = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        stored[name] = (tensor / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        same[name] = stored[name].float() * spread
    _write_twice(folder, exact, stored, same)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    edit_config(folder, quantization_config={**quantization, "weight_block_size": list(block)})


def as_mxfp4(folder: Path, exact: Path) -> None:
    """Replaces the experts of a gpt-oss checkpoint by random ones in MXFP4, as it is published, and writes into
    `exact` the checkpoint with the same numbers in float32, by transformers."""
    generator = torch.Generator().manual_seed(0)
    stored = load_file(folder / "model.safetensors")
    same = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        same[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    _write_twice(folder, exact, stored, same)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _write_twice(
    folder: Path, exact: Path, stored: dict[str, torch.Tensor], same: dict[str, torch.Tensor]
) -> None:
    exact.mkdir()
    (exact / "config.json").write_text((folder / "config.json").read_text())
    save_file(stored, folder / "model.safetensors")
    save_file(same, exact / "model.safetensors", metadata={"format": "pt"})


def add_prediction_layer(folder: Path) -> None:
    """Adds what a published DeepSeek-V3 holds behind its last layer, to predict a token further ahead."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    layer, last = config["num_hidden_layers"], config["num_hidden_layers"] - 1
    extra = {
        name.replace(f"layers.{last}.", f"layers.{layer}."): torch.full_like(tensor, torch.nan)
        for name, tensor in tensors.items()
        if f"layers.{last}." in name
    }
    hidden = config["hidden_size"]
    extra[f"model.layers.{layer}.eh_proj.weight"] = torch.full((hidden, 2 * hidden), torch.nan)
    extra[f"model.layers.{layer}.shared_head.norm.weight"] = torch.full((hidden,), torch.nan)
    save_file({**tensors, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
