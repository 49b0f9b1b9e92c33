"""How a group computes its experts, where there is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ConfigurationError

Quantization = Literal["int8"]


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """See the module.

    Attributes:
        batch_invariant: whether a row's numbers are the same to the bit whatever else is computed with it.
        quantization: "int8": weights are rounded to 8 bits with a scale for every output, and activations stay as
            they are. None: weights of the served dtype.

    Raises:
        ConfigurationError: another quantization.
    """

    batch_invariant: bool = False
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in get_args(Quantization):
            raise ConfigurationError(
                f"expert_quantization must be one of {get_args(Quantization)} or None, is {self.quantization!r}",
                "expert_quantization",
            )


DEFAULTS = ExpertOptions()
