"""What an engine tells of itself."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..batching import QueueStatistics
from .block_pool import BlockStatistics
from .micro_batches import MicroBatchStatistics


class EngineStatistics(NamedTuple):
    """The queue, what runs and what was preempted, the KV cache (bytes of the blocks that hold something, and all
    about them), and since start: preemptions, steps, tokens prefilled, decoded; seconds of steps; histograms of
    seconds to the first token and between tokens. And what was learnt of how long a step takes."""

    queue: QueueStatistics
    running: int
    preempted: int
    kv_bytes: int
    kv_blocks: BlockStatistics
    preemptions: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    step_s: float
    first_token_s: dict[str, Any]
    between_tokens_s: dict[str, Any]
    micro_batches: MicroBatchStatistics
    latency: dict[str, Any]

    def as_plain(self) -> dict[str, Any]:
        """Plain values for the status page."""
        parts = {name: getattr(self, name)._asdict() for name in ("queue", "kv_blocks", "micro_batches")}
        return {**self._asdict(), **parts}
