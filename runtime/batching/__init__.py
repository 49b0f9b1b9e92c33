"""Batching by priority: `queue` orders and bounds what waits, `policy` decides when a batch closes, `overload` who
is given up, `latency` learns how long batches take, `batcher` is the thin asynchronous shell that runs them.
Tensors and generation use the same queue."""

from .batcher import Batcher, BatcherStatistics, Computed
from .books import QueueStatistics
from .classes import CLASS_NAMES, NAMED_PRIORITIES, SERVICE_TIERS, class_of
from .latency import LatencyModel
from .limits import QueueLimits
from .overload import OverloadControl
from .policy import BatchLimits, CloseReason, Decision, decide, patience_s
from .queue import PriorityQueue, QueueItem

__all__ = [
    "CLASS_NAMES",
    "NAMED_PRIORITIES",
    "SERVICE_TIERS",
    "BatchLimits",
    "Batcher",
    "BatcherStatistics",
    "CloseReason",
    "Computed",
    "Decision",
    "LatencyModel",
    "OverloadControl",
    "PriorityQueue",
    "QueueItem",
    "QueueLimits",
    "QueueStatistics",
    "class_of",
    "decide",
    "patience_s",
]
