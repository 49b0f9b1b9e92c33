"""Layer models: written, read back and computed; custom experts; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_experts import NotAModule, Outer, ScaleExpert
from pimoe.runtime.errors import CheckpointError, ConfigurationError
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.layer_model import load_custom_expert, load_gate, write_layer_model
from pimoe.runtime.model.spec import LayerSpec
from reference_experts import ReferenceExperts
from torch import Tensor, nn
from torch.nn.functional import silu


def gated_experts(count: int = 4, hidden: int = 8, inner: int = 12, dtype: Any = None) -> list[dict[str, Tensor]]:
    return [
        {
            "gate_proj.weight": torch.randn(inner, hidden, dtype=dtype),
            "up_proj.weight": torch.randn(inner, hidden, dtype=dtype),
            "down_proj.weight": torch.randn(hidden, inner, dtype=dtype),
        }
        for _ in range(count)
    ]


def open_layer(folder: Path) -> tuple[Checkpoint, LayerSpec]:
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint)
    assert isinstance(spec, LayerSpec)
    return checkpoint, spec


@pytest.mark.parametrize("renormalize", [True, False])
async def test_a_gated_layer_computes_what_was_written(tmp_path: Path, renormalize: bool) -> None:
    gate, experts = torch.randn(4, 8), gated_experts()
    checkpoint, spec = open_layer(write_layer_model(tmp_path, gate, experts, 2, renormalize=renormalize))
    assert (spec.hidden_size, spec.top_k, spec.renormalize, spec.dtype) == (8, 2, renormalize, "float32")
    assert (spec.experts.num_experts, spec.experts.intermediate_size, spec.experts.moe_layers) == (4, 12, (0,))
    hidden = torch.randn(6, 8)
    actual = await ReferenceExperts(checkpoint, spec.experts)(0, hidden, load_gate(checkpoint, spec)(hidden))

    weights, chosen = torch.softmax(hidden @ gate.T, -1).topk(2)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    for row in range(6):
        expected = torch.zeros(8)
        for weight, i in zip(weights[row], chosen[row].tolist(), strict=True):
            w1, w3, w2 = (experts[i][f"{part}_proj.weight"] for part in ("gate", "up", "down"))
            expected += weight * ((silu(hidden[row] @ w1.T) * (hidden[row] @ w3.T)) @ w2.T)
        torch.testing.assert_close(actual[row], expected)


def test_views_of_stacked_experts_can_be_written(tmp_path: Path) -> None:
    stacked = torch.randn(3, 24, 8, dtype=torch.bfloat16)
    down = torch.randn(3, 12, 8, dtype=torch.bfloat16)
    experts = [
        {"gate_proj.weight": w[:12], "up_proj.weight": w[12:], "down_proj.weight": d.T}
        for w, d in zip(stacked, down, strict=True)
    ]
    checkpoint, spec = open_layer(
        write_layer_model(tmp_path, torch.randn(3, 8, dtype=torch.bfloat16), experts, 1, activation="gelu_tanh")
    )
    assert (spec.dtype, spec.experts.activation) == ("bfloat16", "gelu_tanh")
    assert load_gate(checkpoint, spec).weight.dtype is torch.bfloat16
    assert load_gate(checkpoint, spec, torch.float32).weight.dtype is torch.float32
    names = spec.experts.tensor_names(0, 2)
    assert torch.equal(checkpoint.read(names.up), stacked[2, 12:])
    assert torch.equal(checkpoint.read(names.down), down[2].T)


def test_custom_experts_come_back_with_their_state(tmp_path: Path) -> None:
    modules = [ScaleExpert(8, shift=0.5) for _ in range(3)]
    for index, module in enumerate(modules):
        nn.init.constant_(module.scale, index + 1)
        module.counts.fill_(index)
    folder = write_layer_model(
        tmp_path, torch.randn(3, 8), modules, 1, expert_kwargs={"hidden_size": 8, "shift": 0.5}
    )
    checkpoint, spec = open_layer(folder)
    assert spec.experts.custom_class == "custom_experts:ScaleExpert"
    expert = load_custom_expert(checkpoint, spec.experts, 0, 2, torch.float16, "cpu")
    assert isinstance(expert, ScaleExpert)
    assert not expert.training
    assert expert.scale.dtype is torch.float16
    assert expert.counts.tolist() == [2, 2]
    assert expert.counts.dtype is torch.int64
    hidden = torch.randn(2, 8, dtype=torch.float16)
    assert torch.equal(expert(hidden), hidden * 3 + 0.5)


def test_state_dicts_with_a_nested_class(tmp_path: Path) -> None:
    states = [Outer.Inner(4).state_dict() for _ in range(2)]
    folder = write_layer_model(
        tmp_path,
        torch.randn(2, 4),
        states,
        1,
        expert_class="custom_experts:Outer.Inner",
        expert_kwargs={"hidden_size": 4},
    )
    checkpoint, spec = open_layer(folder)
    assert type(load_custom_expert(checkpoint, spec.experts, 0, 1, torch.float32)) is Outer.Inner


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_class": "custom_experts"}, "expected an import path 'package.module:Class'"),
        ({"expert_class": "no_such_module:Expert"}, "cannot be imported here: No module named 'no_such_module'"),
        ({"expert_class": "custom_experts:Missing"}, "cannot be imported here"),
        ({"expert_class": "custom_experts:NotAModule"}, r"no subclass of torch\.nn\.Module"),
        ({"expert_kwargs": {"hidden_size": 8, "wings": 2}}, "cannot be built with .*wings"),
    ],
)
def test_unusable_expert_classes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_layer_model(
        tmp_path, torch.randn(2, 8), [ScaleExpert(8), ScaleExpert(8)], 1, expert_kwargs={"hidden_size": 8}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    checkpoint, spec = open_layer(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        load_custom_expert(checkpoint, spec.experts, 0, 0, torch.float32)


def test_a_state_dict_must_match_exactly(tmp_path: Path) -> None:
    states = [{"scale": torch.ones(8)}, {**ScaleExpert(8).state_dict(), "extra": torch.ones(1)}]
    kwargs: dict[str, Any] = {"expert_class": "custom_experts:ScaleExpert", "expert_kwargs": {"hidden_size": 8}}
    checkpoint, spec = open_layer(write_layer_model(tmp_path, torch.randn(2, 8), states, 1, **kwargs))
    with pytest.raises(CheckpointError, match=r"expert 0 lacks \['counts'\] and has unknown \[\]"):
        load_custom_expert(checkpoint, spec.experts, 0, 0, torch.float32)
    with pytest.raises(CheckpointError, match=r"expert 1 lacks \[\] and has unknown \['extra'\]"):
        load_custom_expert(checkpoint, spec.experts, 0, 1, torch.float32)
    kwargs["expert_kwargs"] = {"hidden_size": 9}
    states = [ScaleExpert(8).state_dict() for _ in range(2)]
    checkpoint, spec = open_layer(write_layer_model(tmp_path, torch.randn(2, 8), states, 1, **kwargs))
    with pytest.raises(CheckpointError, match=r"'experts\.0\.scale' has shape \[8\], expected \[9\]"):
        load_custom_expert(checkpoint, spec.experts, 0, 0, torch.float32)


def test_ill_fitting_layers_are_not_written(tmp_path: Path) -> None:
    gate = torch.randn(4, 8)
    with pytest.raises(ConfigurationError, match=r"gate of shape \[4, 8\] and top_k 2 do not fit 3 experts"):
        write_layer_model(tmp_path, gate, gated_experts(3), 2)
    with pytest.raises(ConfigurationError, match="top_k 5 do not fit"):
        write_layer_model(tmp_path, gate, gated_experts(), 5)
    experts = gated_experts()
    experts[3]["up_proj.weight"] = torch.randn(11, 8)
    with pytest.raises(ConfigurationError, match="expert 3 has shapes"):
        write_layer_model(tmp_path, gate, experts, 2)
    with pytest.raises(ConfigurationError, match=r"expert 0 has \['scale'\]; expected gate_proj"):
        write_layer_model(tmp_path, gate, [{"scale": torch.ones(8)}] * 4, 2)
    with pytest.raises(ConfigurationError, match="modules of one class"):
        write_layer_model(tmp_path, gate, [ScaleExpert(8), nn.Linear(8, 8), *gated_experts(2)], 2)
    with pytest.raises(ConfigurationError, match="no subclass"):
        write_layer_model(tmp_path, gate, gated_experts(), 2, expert_class=f"{NotAModule.__module__}:NotAModule")

    class Local(ScaleExpert):
        """Cannot be imported by another process."""

    with pytest.raises(ConfigurationError, match="cannot be imported here"):
        write_layer_model(tmp_path, gate, [Local(8) for _ in range(4)], 2)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_misshapen_gate_is_found(tmp_path: Path) -> None:
    write_layer_model(tmp_path, torch.randn(4, 8), gated_experts(), 2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 5}))
    checkpoint, spec = open_layer(tmp_path)
    with pytest.raises(CheckpointError, match=r"'gate\.weight' has shape \[4, 8\], expected \[5, 8\]"):
        load_gate(checkpoint, spec)
