"""Rotary embeddings against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pimoe.runtime.model.config_fields import ConfigFields
from pimoe.runtime.model.families.common import read_rope
from pimoe.runtime.model.rope import RotaryTable, inverse_frequencies, rotate
from pimoe.runtime.model.spec import RopeSpec
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding, apply_rotary_pos_emb

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARAMETERS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {**LLAMA3, "original_max_position_embeddings": 8192},
    {**LLAMA3, "original_max_position_embeddings": 256, "high_freq_factor": 2.0},
    LLAMA3,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
]


def both(parameters: dict[str, Any], theta: float, head_dim: int) -> tuple[RopeSpec, Qwen3MoeConfig]:
    values = {"rope_theta": theta, **parameters}
    options: dict[str, Any] = {"head_dim": head_dim, "rope_parameters": dict(values)}
    config = Qwen3MoeConfig(max_position_embeddings=40960, **options)
    return read_rope(ConfigFields({"rope_parameters": values}, "config.json"), 40960, 1.0), config


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (1_000_000.0, 128), (500_000.0, 16)])
def test_frequencies_and_scale_are_those_of_transformers(
    parameters: dict[str, Any], theta: float, head_dim: int
) -> None:
    spec, config = both(parameters, theta, head_dim)
    if spec.kind == "default":
        frequencies, scale = Qwen3MoeRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[spec.kind](config, device="cpu")
    torch.testing.assert_close(inverse_frequencies(spec, head_dim), frequencies, rtol=1e-6, atol=0)
    assert spec.attention_factor == pytest.approx(scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_transformers(dtype: torch.dtype) -> None:
    spec, config = both(PARAMETERS[5], 10_000.0, 32)
    positions = torch.tensor([0, 1, 5, 700, 5000, 39999])
    queries, keys = torch.randn(6, 4, 32, dtype=dtype), torch.randn(6, 2, 32, dtype=dtype)
    cosine, sine = Qwen3MoeRotaryEmbedding(config)(queries, positions[None])
    expected = apply_rotary_pos_emb(queries, keys, cosine[0], sine[0])
    table = RotaryTable(spec, 32, torch.device("cpu"))
    actual = rotate(torch.cat((queries, keys), 1), *table.rows(positions, 40000, dtype))
    tolerance = 1e-5 if dtype is torch.float32 else 0.04
    torch.testing.assert_close(actual, torch.cat(expected, 1), rtol=0, atol=tolerance)


def test_the_table_grows_without_changing_what_it_holds() -> None:
    table = RotaryTable(RopeSpec(), 16, torch.device("cpu"))
    positions = torch.tensor([3, 900])
    before = torch.stack(table.rows(positions, 901, torch.float32))
    table.rows(torch.tensor([9000]), 9001, torch.float32)
    assert torch.equal(torch.stack(table.rows(positions, 901, torch.float32)), before)
