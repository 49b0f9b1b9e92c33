"""Quantized checkpoints: the same numbers as transformers makes of them, read by each group for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import as_fp8, as_mxfp4, edit_config, make_checkpoint, reference_model
from pimoe.runtime.errors import CheckpointError, ConfigurationError
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.decoder import Decoder, ForwardBatch, Segment
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.quantized import dequantize_fp8, dequantize_mxfp4
from pimoe.runtime.model.spec import DecoderSpec
from pimoe.runtime.routing.plan import combine, contiguous_placement, plan_dispatch
from pimoe.runtime.routing.strategies import Routing
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

GPT_OSS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    folder = make_checkpoint("deepseek_v3", tmp_path / "fp8")
    as_fp8(folder, tmp_path / "exact")
    return folder


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    folder = make_checkpoint("gpt_oss", tmp_path / "mxfp4", **GPT_OSS)
    as_mxfp4(folder, tmp_path / "exact")
    return folder


class Groups:
    """An expert dispatch over expert groups that each read the checkpoint for themselves."""

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec, groups: int) -> None:
        self.placement = contiguous_placement(spec.experts.num_experts, groups)
        self.groups = [
            ExpertGroup.load(checkpoint, spec.experts, experts, torch.float32) for experts in self.placement.groups
        ]

    async def __call__(self, layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        plans = plan_dispatch(routing, self.placement)
        partials = [self.groups[plan.group].forward(layer, plan.take(hidden)) for plan in plans]
        with torch.inference_mode():
            return combine(plans, partials, hidden)


async def greedy(folder: Path, groups: int, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the logits of the last one."""
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint)
    assert isinstance(spec, DecoderSpec)
    decoder, experts = Decoder.load(checkpoint, spec, torch.float32), Groups(checkpoint, spec, groups)
    cache = decoder.new_cache(8)
    blocks, start, new, out = list(range(1, 9)), 0, prompt, list[int]()
    logits = torch.empty(0)
    for _ in range(count):
        batch = ForwardBatch(torch.tensor(new), (Segment(blocks, start, len(new)),))
        logits = (await decoder.forward(batch, cache, experts))[0]
        start, new = start + len(new), [int(logits.argmax())]
        out += new
    return out, logits


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
async def test_sixty_four_tokens_equal_those_of_the_same_numbers(
    kind: str, groups: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    model, prompt = reference_model(folder.parent / "exact"), [5, 17, 40, 8, 2, 61]
    tokens, logits = await greedy(folder, groups, prompt, 64)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    assert expected.argmax(-1).tolist() == tokens
    torch.testing.assert_close(logits, expected[-1], atol=1e-4, rtol=0)
    assert len(set(tokens)) > 3


def test_mxfp4_equals_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (2, 5, 3), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(dequantize_mxfp4(blocks, scales), expected)


def test_mxfp4_at_the_ends_of_its_range() -> None:
    blocks = torch.full((3, 1, 16), 0x17, dtype=torch.uint8)  # 0.5 in the upper half, 6 in the lower
    out = dequantize_mxfp4(blocks, torch.tensor([[0], [252], [255]], dtype=torch.uint8))
    assert out[0].tolist() == [6.0 * 2.0**-127, 0.5 * 2.0**-127] * 16
    assert out[1].tolist() == [6.0 * 2.0**125, 0.5 * 2.0**125] * 16
    assert out[2].isnan().all()


def test_fp8_blocks_at_the_edges_are_smaller() -> None:
    values = torch.ones(3, 5)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert dequantize_fp8(values, scales, (2, 2)).tolist() == [
        [1, 1, 2, 2, 3],
        [1, 1, 2, 2, 3],
        [4, 4, 5, 5, 6],
    ]


@pytest.mark.usefixtures("torch_experts")
def test_a_group_reads_its_own_slices_of_mxfp4_only(mxfp4: Path) -> None:
    """Every scale of the other experts becomes NaN."""
    tensors = load_file(mxfp4 / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_scales"):
            tensor[[0, 1, 2, 4, 5]] = 255
    save_file(tensors, mxfp4 / "model.safetensors")
    checkpoint = Checkpoint(mxfp4)
    spec = read_spec(checkpoint).experts
    for experts, finite in (((3,), True), ((2,), False)):
        group = ExpertGroup.load(checkpoint, spec, experts, torch.float32)
        assert bool(group.layers[1].gate_up.isfinite().all()) is finite  # type: ignore[attr-defined]
    assert group.weights_bytes == 4 * spec.parameters_per_expert * len(spec.moe_layers)


def test_fp8_without_scales_is_refused(fp8: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    scales = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, fp8 / "model.safetensors")
    checkpoint = Checkpoint(fp8)
    with pytest.raises(CheckpointError, match=f"no tensor '{name}_scale_inv'"):
        ExpertGroup.load(checkpoint, read_spec(checkpoint).experts, (0,), torch.float32)
    save_file({**tensors, f"{name}_scale_inv": scales[:1]}, fp8 / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{name}_scale_inv' has shape \[1, 4\], expected \[2, 4\]"):
        ExpertGroup.load(Checkpoint(fp8), read_spec(checkpoint).experts, (0,), torch.float32)


def test_bytes_that_no_config_explains_are_refused(fp8: Path) -> None:
    edit_config(fp8, ("quantization_config",))
    checkpoint = Checkpoint(fp8)
    spec = read_spec(checkpoint)
    assert isinstance(spec, DecoderSpec)
    for load in (lambda: Decoder.load(checkpoint, spec), lambda: Groups(checkpoint, spec, 1)):
        with pytest.raises(CheckpointError, match=r"is stored as torch\.float8_e4m3fn; expected floating-point"):
            load()


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("deepseek_v3", {"quant_method": "mxfp4"}, "reads 'fp8' with a weight_block_size"),
        ("deepseek_v3", {"quant_method": "fp8"}, "reads 'fp8' with a weight_block_size"),
        ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [128, 0]}, "reads 'fp8'"),
        ("deepseek_v3", "fp8", "quantization_config = 'fp8' is not supported"),
        ("gpt_oss", {"quant_method": "awq"}, "reads 'mxfp4' here"),
        ("gpt_oss", {"quant_method": "mxfp4"}, "hidden_size = 48; expected a multiple of 32"),
        ("mixtral", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "is not supported by pimoe"),
    ],
)
def test_other_quantizations_are_refused(family: str, values: Any, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    edit_config(folder, quantization_config=values)
    with pytest.raises(ConfigurationError, match=message):
        read_spec(Checkpoint(folder))


@pytest.mark.usefixtures("torch_experts")
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_fp8_of_other_families_is_read_too(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / "fp8")
    as_fp8(folder, tmp_path / "exact")
    exact, checkpoint = Checkpoint(tmp_path / "exact"), Checkpoint(folder)
    spec = read_spec(checkpoint).experts
    ours = ExpertGroup.load(checkpoint, spec, (2, 4), torch.float32).layers[2]
    same = ExpertGroup.load(exact, read_spec(exact).experts, (2, 4), torch.float32).layers[2]
    assert torch.equal(ours.gate_up, same.gate_up)  # type: ignore[attr-defined]
    assert torch.equal(ours.down, same.down)  # type: ignore[attr-defined]
