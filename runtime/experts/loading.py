"""Reads a group's own experts out of a checkpoint, and no byte of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..model.checkpoint import Checkpoint
from ..model.expert_spec import ExpertSpec, StackedSpec
from ..model.layer_model import load_custom_expert
from ..model.quantized import dequantize_mxfp4, read_weight
from .in_tiles import InTiles
from .layers import ClampedExperts, CustomExperts, GatedExperts, LayerExperts, StackedExperts


def load_layers(
    checkpoint: Checkpoint,
    spec: ExpertSpec,
    experts: Sequence[int],
    dtype: torch.dtype,
    device: str,
    batch_invariant: bool = False,
) -> dict[int, LayerExperts]:
    """The experts of all MoE layers, with the fastest kernel for them, or with the one that gives a row the same
    bits in any batch.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
        ConfigurationError: custom experts that cannot be built.
    """
    load = _load_gated if spec.stacked is None else _load_stacked
    if spec.custom_class is not None:
        load = _load_custom
    layers = {layer: load(checkpoint, spec, layer, experts, dtype, device) for layer in spec.moe_layers}
    if batch_invariant:
        return {layer: InTiles(held, len(experts)) for layer, held in layers.items()}
    _calibrate(layers)
    return layers


def _load_gated(
    checkpoint: Checkpoint, spec: ExpertSpec, layer: int, experts: Sequence[int], dtype: torch.dtype, device: str
) -> LayerExperts:
    inner, hidden = spec.intermediate_size, spec.hidden_size
    gate_up, down = _empty(spec, len(experts), dtype, device)
    for local, expert in enumerate(experts):
        names = spec.tensor_names(layer, expert)
        gate_up[local, :inner] = read_weight(checkpoint, names.gate, dtype, (inner, hidden), spec.fp8_block)
        gate_up[local, inner:] = read_weight(checkpoint, names.up, dtype, (inner, hidden), spec.fp8_block)
        down[local] = read_weight(checkpoint, names.down, dtype, (hidden, inner), spec.fp8_block)
    return GatedExperts(gate_up, down, spec.activation)


def _load_stacked(
    checkpoint: Checkpoint, spec: ExpertSpec, layer: int, experts: Sequence[int], dtype: torch.dtype, device: str
) -> LayerExperts:
    assert spec.stacked is not None
    names, stored = spec.stacked.names(layer), spec.stored_shapes(layer)
    gate_up, down = _empty(spec, len(experts), dtype, device)
    biases = gate_up.new_empty(gate_up.shape[:2]), down.new_empty(down.shape[:2])
    for local, expert in enumerate(experts):

        def read(name: str, expert: int = expert) -> Tensor:
            return _slice(checkpoint, name, expert, stored)

        gate_up[local] = _halves(_matrix(spec.stacked, names.gate_up, read))
        biases[0][local] = _halves(read(names.gate_up_bias))
        down[local] = _matrix(spec.stacked, names.down, read)
        biases[1][local] = read(names.down_bias)
    return ClampedExperts(gate_up, down, biases, spec.stacked.alpha, spec.stacked.limit)


def _slice(checkpoint: Checkpoint, name: str, expert: int, stored: Mapping[str, tuple[int, ...]]) -> Tensor:
    return checkpoint.read_slice(name, expert, expert + 1, None, stored[name])[0]


def _matrix(stacked: StackedSpec, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """One expert's matrix `[out, in]`, however it is stored."""
    if not stacked.mxfp4:
        return read(name).T
    return dequantize_mxfp4(read(f"{name}_blocks"), read(f"{name}_scales"))


def _halves(rows: Tensor) -> Tensor:
    """Rows that are gate and up in turn -> all of gate, then all of up."""
    return torch.cat((rows[0::2], rows[1::2]))


def _empty(spec: ExpertSpec, count: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    inner, hidden = spec.intermediate_size, spec.hidden_size
    gate_up = torch.empty(count, 2 * inner, hidden, dtype=dtype, device=device)
    return gate_up, torch.empty(count, hidden, inner, dtype=dtype, device=device)


def _load_custom(
    checkpoint: Checkpoint, spec: ExpertSpec, layer: int, experts: Sequence[int], dtype: torch.dtype, device: str
) -> LayerExperts:
    modules = [load_custom_expert(checkpoint, spec, layer, expert, dtype, device) for expert in experts]
    return CustomExperts(modules, dtype)


def _calibrate(layers: Mapping[int, LayerExperts]) -> None:
    """Layers of one model have one shape: measure the first, and let the others follow it."""
    stacked = [layer for layer in layers.values() if isinstance(layer, StackedExperts)]
    for layer in stacked[:1]:
        layer.calibrate()
    for layer in stacked[1:]:
        layer.grouped_from_pairs = stacked[0].grouped_from_pairs
