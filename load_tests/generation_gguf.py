"""A Qwen3-MoE checkpoint as a GGUF file for llama.cpp. Runs in the environment of llama-cpp-python: numpy and
gguf, neither torch nor pimoe.

The file has no vocabulary: prompts are token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
_ARCHITECTURE = "qwen3moe"
_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT_TENSORS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_KEPT_IN_FLOAT32 = ("ffn_gate_inp",)  # as llama.cpp's own converter does; and every vector


class Safetensors:
    """Tensors of one file as float32; numpy has no bfloat16."""

    def __init__(self, path: Path) -> None:
        size = int(np.fromfile(path, np.uint64, 1)[0])
        self._header: dict[str, Any] = json.loads(path.read_bytes()[8 : 8 + size])
        self._data = np.memmap(path, np.uint8, "r", offset=8 + size)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def read(self, name: str) -> Float32:
        """One tensor.

        Raises:
            ValueError: it is neither bfloat16 nor float32.
        """
        entry = self._header[name]
        first, end = entry["data_offsets"]
        raw = self._data[first:end]
        if entry["dtype"] == "F32":
            return raw.view(np.float32).reshape(entry["shape"])
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; it must be BF16 or F32")
        wide = raw.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry["shape"])


def write_gguf(folder: Path, path: Path, matrices: str) -> None:
    """Write the checkpoint in `folder` to `path`.

    Args:
        matrices: what they are kept as: "BF16", "Q8_0", or another type that gguf quantizes to.

    Raises:
        ValueError: the checkpoint is of another architecture, or a tensor of another dtype.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "qwen3_moe":
        raise ValueError(f"{folder} is a {config.get('model_type')!r} checkpoint; it must be 'qwen3_moe'")
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    _write_config(writer, config)
    for name, tensor in _tensors(Safetensors(folder / "model.safetensors"), config):
        if tensor.ndim == 1 or any(part in name for part in _KEPT_IN_FLOAT32):
            writer.add_tensor(name, tensor)
        else:
            kind = gguf.GGMLQuantizationType[matrices]
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(source: Safetensors, config: dict[str, Any]) -> Iterator[tuple[str, Float32]]:
    yield "token_embd.weight", source.read("model.embed_tokens.weight")
    yield "output_norm.weight", source.read("model.norm.weight")
    if "lm_head.weight" in source:
        yield "output.weight", source.read("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        for name, other in _LAYER_TENSORS.items():
            yield f"{theirs}.{other}.weight", source.read(f"{ours}.{name}.weight")
        for name, other in _EXPERT_TENSORS.items():
            experts = range(config["num_experts"])
            stacked = np.stack([source.read(f"{ours}.mlp.experts.{e}.{name}.weight") for e in experts])
            yield f"{theirs}.{other}.weight", stacked
