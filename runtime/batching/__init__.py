"""Batching by priority: `queue` orders and bounds what waits, `policy` decides when a batch closes, `batcher` is
the thin asynchronous shell that runs batches. Tensors and generation use the same queue."""

from .batcher import Batcher, BatcherStatistics
from .policy import BatchLimits, CloseReason, Decision, decide, patience_s
from .queue import PriorityQueue, QueueItem, QueueLimits

__all__ = [
    "BatchLimits",
    "Batcher",
    "BatcherStatistics",
    "CloseReason",
    "Decision",
    "PriorityQueue",
    "QueueItem",
    "QueueLimits",
    "decide",
    "patience_s",
]
