"""What `CachedBackend` counts."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from .result_cache import CacheStatistics
from .second_level import SecondLevelStatistics

BypassReason: TypeAlias = Literal["asked", "disabled", "nondeterministic"]
AnsweredBy: TypeAlias = Literal["memory", "second", "coalesced", "miss", "bypass"]
BYPASS_REASONS: tuple[BypassReason, ...] = get_args(BypassReason)
ANSWERED_BY: tuple[AnsweredBy, ...] = get_args(AnsweredBy)


class CachedStatistics(NamedTuple):
    """Counts since start.

    Attributes:
        memory: of the first level; its hits are those of `outcomes`' "memory", its misses those of "miss".
        second: of the second level, None where there is none. It is asked once for many equal requests.
        outcomes: requests by `AnsweredBy`, every one there; those of `CachedBackend.warm` are not among them.
        bypass_reasons: requests that the cache left alone, by `BypassReason`.
        superseded: computations that a more urgent request began beside a less urgent one's.
    """

    memory: CacheStatistics
    second: SecondLevelStatistics | None
    outcomes: dict[str, int]
    bypass_reasons: dict[str, int]
    superseded: int
