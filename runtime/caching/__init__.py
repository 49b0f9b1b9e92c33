"""The result cache: `key` says when two requests are the same, `result_cache` holds answers in memory under a
choice of eviction policies, `second_level` (`redis_level`) keeps them for all gateways as `entry` describes,
`flight` lets equal requests share one computation, `prefetch` computes ahead, and `cached_backend` puts all of it
in front of whatever computes."""

from .cached_backend import CachedBackend
from .cached_statistics import BypassReason, CachedStatistics
from .entry import CachedAnswer
from .hits import held_bytes
from .key import Serving, generate_key, infer_key
from .prefetch import Prefetcher, PrefetchStatistics
from .prefetch_limits import PrefetchLimits
from .redis_level import RedisLevel
from .redis_limits import RedisLimits
from .result_cache import CacheLimits, CacheStatistics, EntryTags, ResultCache
from .second_level import SecondLevel, SecondLevelStatistics

__all__ = [
    "BypassReason",
    "CacheLimits",
    "CacheStatistics",
    "CachedAnswer",
    "CachedBackend",
    "CachedStatistics",
    "EntryTags",
    "PrefetchLimits",
    "PrefetchStatistics",
    "Prefetcher",
    "RedisLevel",
    "RedisLimits",
    "ResultCache",
    "SecondLevel",
    "SecondLevelStatistics",
    "Serving",
    "generate_key",
    "held_bytes",
    "infer_key",
]
