"""The result cache: `key` says when two requests are the same, `result_cache` holds bytes under LRU with single
flight, `cached_backend` puts it in front of whatever computes."""

from .cached_backend import CachedBackend
from .key import generate_key, infer_key
from .result_cache import CacheLimits, CacheStatistics, ResultCache

__all__ = ["CacheLimits", "CacheStatistics", "CachedBackend", "ResultCache", "generate_key", "infer_key"]
