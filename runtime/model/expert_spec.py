"""What an expert group needs to know of a model, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..errors import ConfigurationError
from .spec_checks import among, positive, wrong

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
MXFP4_BLOCK = 32  # values that share one exponent
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")


class GatedNames(NamedTuple):
    """The tensor names of one gated expert: `down(act(gate(x)) * up(x))`."""

    gate: str
    up: str
    down: str


class StackedNames(NamedTuple):
    """The tensor names of one layer's experts where they are stored together."""

    gate_up: str
    gate_up_bias: str
    down: str
    down_bias: str


@dataclass(frozen=True, slots=True)
class StackedSpec:
    """Experts of a layer stored together, with biases and a clamped SwiGLU (gpt-oss).

    With `g = min(gate, limit)` and `u` = up clamped to plus and minus limit, an expert is
    `down(g * sigmoid(alpha * g) * (u + 1))`. Stored are `gate_up_proj [experts, hidden, 2 * intermediate]`, whose
    columns are gate and up in turn, `down_proj [experts, intermediate, hidden]`, and a bias for each,
    `<name>_bias [experts, columns]`.

    Attributes:
        prefix: what stands before these names, with the field `{layer}`.
        alpha, limit: see above.
        mxfp4: matrices are stored transposed, as `<name>_blocks` and `<name>_scales` (see `quantized`).
    """

    prefix: str
    alpha: float = 1.702
    limit: float = 7.0
    mxfp4: bool = False

    def __post_init__(self) -> None:
        positive(self, "alpha", "limit")

    def names(self, layer: int) -> StackedNames:
        """The names of a layer's tensors; with `mxfp4` those of the matrices get a suffix."""
        prefix = self.prefix.format(layer=layer)
        names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        return StackedNames(*(prefix + name for name in names))


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """What an expert group needs to know of the model.

    Attributes:
        intermediate_size: rows of `gate` and `up`; 0 for custom experts.
        activation: of gated experts; "silu" for custom ones, where nobody reads it.
        moe_layers: indices of the layers that have experts, ascending.
        gate, up, down: tensor names of gated experts, with the fields `{layer}` and `{expert}`.
        stacked: set where the experts of a layer are stored together, in place of those names.
        custom_class: import path "package.module:Class" of an nn.Module `[tokens, hidden] -> [tokens, hidden]`;
            None for gated experts.
        custom_kwargs: keyword arguments of that class.
        custom_prefix: what stands before the class's own parameter names, with the same two fields.
        fp8_block: rows and columns that share a scale, in checkpoints with weights in FP8.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    moe_layers: tuple[int, ...]
    gate: str = ""
    up: str = ""
    down: str = ""
    custom_class: str | None = None
    custom_kwargs: Mapping[str, Any] = field(default_factory=dict)
    custom_prefix: str = ""
    stacked: StackedSpec | None = None
    fp8_block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        positive(self, "num_experts", "hidden_size")
        among(self, "activation", ACTIVATIONS)
        if not self.moe_layers or list(self.moe_layers) != sorted(set(self.moe_layers)):
            raise wrong(self, "moe_layers", "at least one layer index, ascending")
        if self.custom_class is None:
            positive(self, "intermediate_size")
            templates = [] if self.stacked else [self.gate, self.up, self.down]
        else:
            templates = [self.custom_prefix]
        if self.stacked is not None and self.stacked.mxfp4:
            for name in ("hidden_size", "intermediate_size"):
                if getattr(self, name) % MXFP4_BLOCK:
                    raise wrong(self, name, f"a multiple of {MXFP4_BLOCK}, as MXFP4 stores them")
        if any("{expert}" not in template for template in templates):
            raise ConfigurationError(f"ExpertSpec: every tensor name needs {{expert}}, got {templates}")

    def tensor_names(self, layer: int, expert: int) -> GatedNames:
        """The names of a gated expert's tensors: `[intermediate, hidden]` twice, then `[hidden, intermediate]`."""
        return GatedNames(*(name.format(layer=layer, expert=expert) for name in (self.gate, self.up, self.down)))

    def stored_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of a layer's experts and its shape as stored; empty for custom experts."""
        if self.custom_class is not None:
            return {}
        if self.stacked is not None:
            return _stacked_shapes(self, self.stacked, layer)
        inner, hidden = self.intermediate_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for expert in range(self.num_experts):
            names = self.tensor_names(layer, expert)
            shapes |= {names.gate: (inner, hidden), names.up: (inner, hidden), names.down: (hidden, inner)}
        return shapes

    @property
    def parameters_per_expert(self) -> int:
        """Numbers in one expert of one layer; 0 for custom experts, whose class decides."""
        biases = 2 * self.intermediate_size + self.hidden_size if self.stacked else 0
        return 0 if self.custom_class else 3 * self.intermediate_size * self.hidden_size + biases

    def prefix(self, layer: int, expert: int) -> str:
        """What stands before the parameter names of a custom expert, such as "experts.3."."""
        return self.custom_prefix.format(layer=layer, expert=expert)


def _stacked_shapes(spec: ExpertSpec, stacked: StackedSpec, layer: int) -> dict[str, tuple[int, ...]]:
    count, inner, hidden, names = spec.num_experts, spec.intermediate_size, spec.hidden_size, stacked.names(layer)
    biases: dict[str, tuple[int, ...]] = {names.gate_up_bias: (count, 2 * inner), names.down_bias: (count, hidden)}
    if not stacked.mxfp4:
        return {names.gate_up: (count, hidden, 2 * inner), names.down: (count, inner, hidden), **biases}
    for name, rows, columns in ((names.gate_up, 2 * inner, hidden), (names.down, hidden, inner)):
        biases[f"{name}_blocks"] = (count, rows, columns // MXFP4_BLOCK, 16)
        biases[f"{name}_scales"] = (count, rows, columns // MXFP4_BLOCK)
    return biases
