"""The bounds of a router's parts, together."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..batching import BatchLimits, QueueLimits
from ..generation.limits import EngineLimits


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Batching of tensors, the queue in front of it and of the engine, and generation; and whether statistics name
    single experts."""

    batching: BatchLimits = field(default_factory=BatchLimits)
    queue: QueueLimits = field(default_factory=QueueLimits)
    engine: EngineLimits = field(default_factory=EngineLimits)
    per_expert_metrics: bool = False
