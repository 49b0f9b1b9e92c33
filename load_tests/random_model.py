"""A Qwen3-MoE checkpoint with random weights, made on the spot: as large as wanted, the same every time.

The embedded model is so small that Python takes most of a step; this one is large enough for its arithmetic to
count. There is no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_LIMIT = 0.09


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. The defaults hold 215 MB in bfloat16, of which a token reads 46 MB."""

    hidden_size: int = 512
    num_layers: int = 8
    num_experts: int = 32
    top_k: int = 4
    expert_size: int = 256
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    vocab_size: int = 4096
    max_tokens: int = 2048
    dtype: str = "bfloat16"


def write_random_model(folder: Path, shape: Shape | None = None, seed: int = 0) -> Path:
    """Write the checkpoint into `folder` and return it."""
    shape = shape or Shape()
    dtype: torch.dtype = getattr(torch, shape.dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(size, dtype=dtype) if len(size) == 1 else _random(size, generator).to(dtype)
        for name, size in _tensor_shapes(shape)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2))
    return folder


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Uniform: drawn several times faster than normal, and as good where nothing is learnt.
    return torch.empty(size).uniform_(-_LIMIT, _LIMIT, generator=generator)


def _tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = shape.hidden_size, shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (shape.num_heads * head, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (shape.num_kv_heads * head, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (shape.num_kv_heads * head, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, shape.num_heads * head)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.mlp.gate.weight", (shape.num_experts, hidden)
        for expert in range(shape.num_experts):
            experts = f"{prefix}.mlp.experts.{expert}"
            yield f"{experts}.gate_proj.weight", (shape.expert_size, hidden)
            yield f"{experts}.up_proj.weight", (shape.expert_size, hidden)
            yield f"{experts}.down_proj.weight", (hidden, shape.expert_size)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "eos_token_id": None,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.expert_size,
        "max_position_embeddings": shape.max_tokens,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.expert_size,
        "norm_topk_prob": True,
        "num_attention_heads": shape.num_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": shape.dtype,
        "vocab_size": shape.vocab_size,
    }
