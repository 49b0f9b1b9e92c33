"""pimoe's cache and those of libraries, as a trace sees them: the same bytes, the same entries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Protocol

from pimoe.runtime.caching.eviction import POLICIES
from pimoe.runtime.caching.result_cache import ENTRY_OVERHEAD_BYTES, CacheLimits, ResultCache

LIBRARIES = ("cachetools", "cachebox", "moka_py")


def weight(size_bytes: int) -> int:
    """What an entry counts, for all contenders alike."""
    return size_bytes + ENTRY_OVERHEAD_BYTES


class Contender(Protocol):
    """A cache, as a trace sees it."""

    def get(self, key: bytes) -> object | None:
        """What is stored."""
        ...

    def put(self, key: bytes, size_bytes: int) -> None:
        """Store an entry of that size."""
        ...

    def held_bytes(self) -> int:
        """Held now."""
        ...


class Ours:
    """pimoe's cache, with a policy; from a sixteenth of the size up if it adapts."""

    def __init__(self, policy: str, capacity_bytes: int, watched: bool, adapts: bool = False) -> None:
        least = capacity_bytes // 16 if adapts else None
        limits = CacheLimits(capacity_bytes, capacity_bytes, policy=policy, min_bytes=least)
        self.cache: ResultCache[int] = ResultCache(limits)
        self.get = self.cache.get

    def put(self, key: bytes, size_bytes: int) -> None:
        """See `Contender`."""
        self.cache.put(key, size_bytes, size_bytes)

    def held_bytes(self) -> int:
        """See `Contender`."""
        return self.cache.statistics().bytes


class Mapping:
    """A cache of a library that is a mapping whose values are their own sizes."""

    def __init__(self, cache: Any, size_of: Callable[[Any], int]) -> None:
        self._cache, self._size_of = cache, size_of
        self.get = cache.get

    def put(self, key: bytes, size_bytes: int) -> None:
        """See `Contender`. Entries larger than all of it are refused with an error of the library's own."""
        with contextlib.suppress(ValueError, OverflowError):
            self._cache[key] = size_bytes

    def held_bytes(self) -> int:
        """See `Contender`."""
        return self._size_of(self._cache)


class Moka:
    """moka's W-TinyLFU. Its maintenance runs when it pleases, as it does in use, and what it says that it holds
    lags behind: when watched, a listener counts what has really gone. `bounded` has it do so at each put.
    """

    def __init__(self, module: Any, bounded: bool, capacity_bytes: int, watched: bool) -> None:
        self._held = 0
        listener = self._gone if watched else None
        self._cache = module.Moka(capacity_bytes, weigher=lambda _, n: weight(n), eviction_listener=listener)
        self._bounded, self.get = bounded, self._cache.get

    def put(self, key: bytes, size_bytes: int) -> None:
        """See `Contender`."""
        self._held += weight(size_bytes)
        self._cache.set(key, size_bytes)
        if self._bounded:
            self._cache.run_pending_tasks()

    def held_bytes(self) -> int:
        """See `Contender`."""
        return self._held

    def _gone(self, key: bytes, size_bytes: int, cause: str) -> None:
        self._held -= weight(size_bytes)


Maker = Callable[[int, bool], Contender]  # of a capacity, and whether its bytes are going to be watched


def contenders() -> tuple[dict[str, Maker], dict[str, str]]:
    """Makers by name, and libraries that cannot take part, with the reason."""
    makers: dict[str, Maker] = {name: partial(Ours, name) for name in POLICIES}
    skipped = {}
    for library in LIBRARIES:
        try:
            module = import_module(library)
        except ImportError as error:
            skipped[library] = str(error)
        else:
            makers |= _makers(library.partition("_")[0], module)
    return makers, skipped


def _makers(library: str, module: Any) -> dict[str, Maker]:
    if library == "moka":
        return {"moka w-tinylfu": partial(Moka, module, False), "moka bounded": partial(Moka, module, True)}
    kinds = {"lru": module.LRUCache, "lfu": module.LFUCache}
    make = _cachetools if library == "cachetools" else _cachebox
    return {f"{library} {name}": partial(make, kind) for name, kind in kinds.items()}


def _cachetools(kind: Any, capacity_bytes: int, watched: bool) -> Contender:
    return Mapping(kind(capacity_bytes, getsizeof=weight), lambda cache: int(cache.currsize))


def _cachebox(kind: Any, capacity_bytes: int, watched: bool) -> Contender:
    cache = kind(capacity_bytes, getsizeof=lambda _, size: weight(size))
    return Mapping(cache, lambda cache: int(cache.current_size()))
