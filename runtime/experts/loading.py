"""Reads a group's own experts out of a checkpoint, and no byte of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..model.checkpoint import Checkpoint
from ..model.expert_spec import ExpertSpec, StackedSpec
from ..model.layer_model import load_custom_expert
from ..model.quantized import dequantize_mxfp4, read_weight
from ..native import kernels
from .in_tiles import InTiles
from .int8 import Int8Experts
from .layers import ClampedExperts, CustomExperts, GatedExperts, LayerExperts, SortedExperts, StackedExperts
from .native import NativeExperts, has_native
from .options import ExpertOptions
from .tensors import ExpertTensors


class _Stored(LayerExperts, Protocol):
    """A layer's experts that take over their tensors one by one."""

    def store(self, expert: int, tensors: ExpertTensors) -> None: ...


def load_layers(
    checkpoint: Checkpoint,
    spec: ExpertSpec,
    experts: Sequence[int],
    dtype: torch.dtype,
    device: str,
    options: ExpertOptions,
) -> dict[int, LayerExperts]:
    """The experts of all MoE layers, with the fastest kernel for them that `options` allow.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
        ConfigurationError: custom experts that cannot be built, or cannot be rounded.
    """
    layers: dict[int, LayerExperts]
    if spec.custom_class is not None:
        if options.quantization is not None:
            raise ConfigurationError(
                "expert_quantization is for gated experts: how custom ones compute is not known",
                "expert_quantization",
            )
        layers = {layer: _custom(checkpoint, spec, layer, experts, dtype, device) for layer in spec.moe_layers}
    else:
        read = _read_gated if spec.stacked is None else _read_stacked
        make = _kind(spec, len(experts), dtype, device, options)
        stored = {layer: make() for layer in spec.moe_layers}
        for layer, held in stored.items():
            for local, expert in enumerate(experts):
                held.store(local, read(checkpoint, spec, layer, expert, dtype))
        layers = {**stored}
    if options.batch_invariant:
        return {
            layer: InTiles(held) if isinstance(held, SortedExperts) else held for layer, held in layers.items()
        }
    _calibrate(layers)
    return layers


def _kind(
    spec: ExpertSpec, count: int, dtype: torch.dtype, device: str, options: ExpertOptions
) -> Callable[[], _Stored]:
    """Makes a layer of the kind of experts that computes fastest here.

    Nothing is measured for it: the native kernels and torch round differently, and two replicas of a group must
    give the same bits.
    """
    int8 = options.quantization == "int8"
    if has_native(spec, dtype, device) and kernels.are_fast():
        return lambda: NativeExperts(count, spec, dtype, int8)
    if int8:
        return lambda: Int8Experts(_stacked(spec, count, dtype, device))
    return lambda: _stacked(spec, count, dtype, device)


def _stacked(spec: ExpertSpec, count: int, dtype: torch.dtype, device: str) -> StackedExperts:
    inner, hidden = spec.intermediate_size, spec.hidden_size
    gate_up = torch.empty(count, 2 * inner, hidden, dtype=dtype, device=device)
    down = torch.empty(count, hidden, inner, dtype=dtype, device=device)
    if spec.stacked is None:
        return GatedExperts(gate_up, down, spec.activation)
    biases = gate_up.new_empty(gate_up.shape[:2]), down.new_empty(down.shape[:2])
    return ClampedExperts(gate_up, down, biases, spec.stacked.alpha, spec.stacked.limit)


def _read_gated(
    checkpoint: Checkpoint, spec: ExpertSpec, layer: int, expert: int, dtype: torch.dtype
) -> ExpertTensors:
    inner, hidden = spec.intermediate_size, spec.hidden_size
    names = spec.tensor_names(layer, expert)
    gate = read_weight(checkpoint, names.gate, dtype, (inner, hidden), spec.fp8_block)
    up = read_weight(checkpoint, names.up, dtype, (inner, hidden), spec.fp8_block)
    down = read_weight(checkpoint, names.down, dtype, (hidden, inner), spec.fp8_block)
    return ExpertTensors(torch.cat((gate, up)), down)


def _read_stacked(
    checkpoint: Checkpoint, spec: ExpertSpec, layer: int, expert: int, dtype: torch.dtype
) -> ExpertTensors:
    assert spec.stacked is not None
    names, stored = spec.stacked.names(layer), spec.stored_shapes(layer)

    def read(name: str) -> Tensor:
        return checkpoint.read_slice(name, expert, expert + 1, None, stored[name])[0]

    return ExpertTensors(
        _halves(_matrix(spec.stacked, names.gate_up, read)).to(dtype),
        _matrix(spec.stacked, names.down, read).to(dtype),
        (_halves(read(names.gate_up_bias)).to(dtype), read(names.down_bias).to(dtype)),
    )


def _matrix(stacked: StackedSpec, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """One expert's matrix `[out, in]`, however it is stored."""
    if not stacked.mxfp4:
        return read(name).T
    return dequantize_mxfp4(read(f"{name}_blocks"), read(f"{name}_scales"))


def _halves(rows: Tensor) -> Tensor:
    """Rows that are gate and up in turn -> all of gate, then all of up."""
    return torch.cat((rows[0::2], rows[1::2]))


def _custom(
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
