"""The layer model: one MoE layer, or any set of custom experts behind a gate, as a checkpoint folder.

    config.json          {"model_type": "pimoe_layer", "hidden_size", "num_experts", "num_experts_per_tok",
                          "norm_topk_prob", "intermediate_size", "hidden_act", "dtype"}
    model.safetensors    gate.weight                                        [experts, hidden]
                         experts.{i}.gate_proj.weight, up_proj.weight       [intermediate, hidden]
                         experts.{i}.down_proj.weight                       [hidden, intermediate]

With "expert_class": "package.module:Class" (and "expert_kwargs") in the config, each expert is an instance of
that nn.Module, `[tokens, hidden] -> [tokens, hidden]`, and its tensors are `experts.{i}.<name in its state
dict>`. The class is imported where the experts run, so it must be installed there; a checkpoint names code
and never contains any.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigurationError
from ..routing.strategies import TopKSoftmax
from .checkpoint import SINGLE_FILE, Checkpoint
from .spec import Activation, ExpertSpec, LayerSpec

_GATED_NAMES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def write_layer_model(
    folder: Path | str,
    gate: Tensor,
    experts: Sequence[Mapping[str, Tensor] | nn.Module],
    top_k: int,
    *,
    renormalize: bool = True,
    activation: Activation = "silu",
    expert_class: str | None = None,
    expert_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a layer model that `pimoe` can serve.

    Args:
        folder: made where it is missing.
        gate: `[experts, hidden]`; its dtype is the model's.
        experts: gated ones as mappings of the tensors `gate_proj.weight`, `up_proj.weight`, `down_proj.weight`;
            custom ones as modules, or as state dicts of `expert_class`.
        top_k: experts per token.
        renormalize: divide each token's chosen gate weights by their sum.
        activation: of gated experts.
        expert_class: import path "package.module:Class" of custom experts; None takes the modules' own class.
        expert_kwargs: the arguments that build that class; plain JSON values.

    Returns:
        `folder`.

    Raises:
        ConfigurationError: shapes that do not fit, experts of different kinds, or a class that cannot be imported.
    """
    states = [dict(expert.state_dict() if isinstance(expert, nn.Module) else expert) for expert in experts]
    if gate.dim() != 2 or gate.shape[0] != len(states) or not 1 <= top_k <= len(states):
        raise ConfigurationError(
            f"gate of shape {list(gate.shape)} and top_k {top_k} do not fit {len(states)} experts; "
            f"expected [{len(states)}, hidden] and 1 to {len(states)}"
        )
    config: dict[str, Any] = {
        "model_type": "pimoe_layer",
        "hidden_size": gate.shape[1],
        "num_experts": len(states),
        "num_experts_per_tok": top_k,
        "norm_topk_prob": renormalize,
        "dtype": str(gate.dtype).removeprefix("torch."),
    }
    # Modules always keep their own class: one with the names of a gated expert may still compute something else.
    if expert_class is None and not any(isinstance(expert, nn.Module) for expert in experts):
        config |= {"intermediate_size": _intermediate_size(states, gate.shape[1]), "hidden_act": activation}
    else:
        path = expert_class or _class_path(experts)
        import_expert_class(path)
        config |= {"expert_class": path, "expert_kwargs": dict(expert_kwargs or {})}
    tensors = {f"experts.{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}
    written = Path(folder)
    _write(written, config, {"gate.weight": gate, **tensors})
    return written


def load_gate(
    checkpoint: Checkpoint, spec: LayerSpec, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> TopKSoftmax:
    """The layer model's routing strategy.

    Args:
        dtype: of the gate matrix; None for the config's.

    Raises:
        CheckpointError: the gate is missing or has another shape.
    """
    shape = (spec.experts.num_experts, spec.hidden_size)
    weight = checkpoint.read(spec.gate, dtype or getattr(torch, spec.dtype), shape).to(device)
    return TopKSoftmax(weight, spec.top_k, spec.renormalize)


def load_custom_expert(
    checkpoint: Checkpoint,
    spec: ExpertSpec,
    layer: int,
    expert: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """One custom expert, built and filled, in evaluation mode.

    Args:
        dtype: of its floating-point tensors.

    Raises:
        ConfigurationError: the class cannot be imported, is no nn.Module, or does not take `expert_kwargs`.
        CheckpointError: the tensors are not exactly those of the class's state dict.
    """
    kind = import_expert_class(spec.custom_class or "")
    try:
        module = kind(**spec.custom_kwargs)
    except Exception as error:  # whatever a foreign constructor raises
        raise ConfigurationError(
            f"expert_class {spec.custom_class!r} cannot be built with {dict(spec.custom_kwargs)}: {error}"
        ) from error
    prefix, wanted = spec.prefix(layer, expert), module.state_dict()
    stored = {name.removeprefix(prefix) for name in checkpoint.names if name.startswith(prefix)}
    if stored != set(wanted):
        raise CheckpointError(
            f"{checkpoint.folder}: expert {expert} lacks {sorted(set(wanted) - stored)} and has unknown "
            f"{sorted(stored - set(wanted))}, compared with {spec.custom_class}"
        )
    state = {name: checkpoint.read(prefix + name, None, tuple(like.shape)) for name, like in wanted.items()}
    module.load_state_dict(state)
    return module.to(device=device, dtype=dtype).eval()


def import_expert_class(path: str) -> type[nn.Module]:
    """The class at "package.module:Class".

    Raises:
        ConfigurationError: it cannot be imported or is no subclass of nn.Module.
    """
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        raise ConfigurationError(f"expert_class = {path!r}; expected an import path 'package.module:Class'")
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs foreign code
        raise ConfigurationError(f"expert_class {path!r} cannot be imported here: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigurationError(f"expert_class {path!r} is no subclass of torch.nn.Module")
    return found


def _intermediate_size(states: Sequence[Mapping[str, Tensor]], hidden_size: int) -> int:
    size = 0
    for expert, state in enumerate(states):
        if set(state) != set(_GATED_NAMES):
            raise ConfigurationError(f"expert {expert} has {sorted(state)}; expected {', '.join(_GATED_NAMES)}")
        shapes = [tuple(state[name].shape) for name in _GATED_NAMES]
        size = size or shapes[0][0]
        if shapes != [(size, hidden_size), (size, hidden_size), (hidden_size, size)]:
            raise ConfigurationError(
                f"expert {expert} has shapes {shapes}; expected gate and up [{size}, {hidden_size}], down "
                f"[{hidden_size}, {size}] like the first expert and the gate"
            )
    return size


def _class_path(experts: Sequence[Mapping[str, Tensor] | nn.Module]) -> str:
    kinds = {type(expert) for expert in experts}
    kind = next(iter(kinds))
    if len(kinds) != 1 or not issubclass(kind, nn.Module):
        raise ConfigurationError(
            f"experts must all be modules of one class or all mappings, unless expert_class is given; got "
            f"{sorted(kind.__name__ for kind in kinds)}"
        )
    return f"{kind.__module__}:{kind.__qualname__}"


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share memory, as views of stacked experts do.
    owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(owned, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
