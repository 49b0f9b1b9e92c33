"""The bounds of generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..errors import ConfigurationError
from .micro_batches import MicroBatching


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of generation.

    Attributes:
        max_sequences: running at once.
        max_step_tokens: tokens computed in one step: of those that decode, and of prompts with what is left.
        max_context_tokens: prompt and answer of one sequence; None: the model's own limit.
        block_tokens: tokens of a block of the KV cache.
        kv_blocks: blocks of the KV cache; None: as many as `kv_memory_fraction` of the memory that is free when
            the engine is made gives, and no more than twice what `max_sequences` of the longest sequences fill.
        micro_batches: whether a step runs as two micro-batches: "auto" where that is expected to pay, "always"
            where there are two sequences, "never".
        reuse_prefixes: whether what is known of a prompt's beginning is not computed again.
        drain_s: how long a stopping engine lets running sequences go on.
    """

    max_sequences: int = 32
    max_step_tokens: int = 512
    max_context_tokens: int | None = None
    block_tokens: int = 16  # `BLOCK_TOKENS`, written out: who only reads settings need not import torch
    kv_blocks: int | None = None
    kv_memory_fraction: float = 0.25
    reuse_prefixes: bool = True
    micro_batches: MicroBatching = "auto"
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens", "max_context_tokens", "block_tokens", "kv_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"engine.{name} is {value}; it must be at least 1", name)
        if not 0 < self.kv_memory_fraction <= 1:
            text = f"engine.kv_memory_fraction is {self.kv_memory_fraction}; it must be above 0 and at most 1"
            raise ConfigurationError(text, "kv_memory_fraction")
        if self.micro_batches not in get_args(MicroBatching):
            text = f"engine.micro_batches is {self.micro_batches!r}; it must be one of {get_args(MicroBatching)}"
            raise ConfigurationError(text, "micro_batches")
        if not self.drain_s >= 0:
            raise ConfigurationError(f"engine.drain_s is {self.drain_s}; it must be at least 0", "drain_s")
