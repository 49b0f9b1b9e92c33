"""Opening a checkpoint for serving: which model it is, and the parts that the router holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError
from ..requests import ModelInfo
from ..routing.in_tiles import row_by_row
from ..routing.strategies import RoutingStrategy
from ..tensors import torch_dtype
from .checkpoint import Checkpoint
from .decoder import Decoder
from .families import read_spec
from .layer_model import load_gate
from .spec import DTYPES, DecoderSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Trunk:
    """Everything of a model but its experts.

    Attributes:
        gates: routing strategy of every MoE layer.
        decoder: None for a layer model.
        weights_bytes: held by the trunk.
    """

    info: ModelInfo
    gates: Mapping[int, RoutingStrategy]
    decoder: Decoder | None
    weights_bytes: int


def serving_dtype(spec: ModelSpec, dtype: str | None) -> str:
    """The dtype that a model is served in: the wanted one, else the checkpoint's own.

    Raises:
        ConfigurationError: no dtype that models are computed in.
    """
    chosen = dtype or spec.dtype
    if chosen not in DTYPES:
        raise ConfigurationError(f"dtype {chosen!r} is not one of {', '.join(DTYPES)}", "dtype")
    return chosen


def load_trunk(
    folder: Path,
    name: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    batch_invariant: bool = False,
) -> Trunk:
    """Load a checkpoint's trunk, and nothing of its experts.

    Args:
        name: what the model is called in requests; the folder's name by default.
        batch_invariant: see `Decoder.load`.

    Raises:
        CheckpointError, UnknownFamilyError, ConfigurationError.
    """
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint)
    served_in = serving_dtype(spec, dtype)
    info = _describe(checkpoint, spec, name or folder.resolve().name, served_in)
    if isinstance(spec, DecoderSpec):
        decoder = Decoder.load(checkpoint, spec, torch_dtype(served_in), device, batch_invariant)
        return Trunk(info, decoder.gates, decoder, decoder.weights_bytes)
    gate = load_gate(checkpoint, spec, torch_dtype(served_in), device)
    gates: dict[int, RoutingStrategy] = {spec.experts.moe_layers[0]: row_by_row(gate) if batch_invariant else gate}
    return Trunk(info, gates, None, gate.weight.nbytes)


def _describe(checkpoint: Checkpoint, spec: ModelSpec, name: str, dtype: str) -> ModelInfo:
    is_decoder = isinstance(spec, DecoderSpec)
    return ModelInfo(
        name=name,
        kind="decoder" if is_decoder else "layer",
        family=spec.family,
        dtype=dtype,
        hidden_size=spec.experts.hidden_size,
        num_experts=spec.experts.num_experts,
        top_k=spec.top_k,
        moe_layers=spec.experts.moe_layers,
        vocab_size=spec.vocab_size if isinstance(spec, DecoderSpec) else 0,
        max_context_tokens=spec.max_context_tokens if isinstance(spec, DecoderSpec) else 0,
        eos_token_ids=spec.eos_token_ids if isinstance(spec, DecoderSpec) else (),
        weights_digest=checkpoint.digest(),
    )
