"""What lies where in a Redis server. See `redis_level` for why.

    {namespace}:e:{model}:{tenant}:{key}   an entry: ticket (16 bytes), then what `entry` describes
    {namespace}:g:a                        generation of everything: 16 random bytes
    {namespace}:g:m:{model}                generation of a model's entries
    {namespace}:g:t:{tenant}               generation of a tenant's

Model and tenant stand there as digests: they may hold anything, and a pattern must match no more than it says.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from .entry import Associated
from .result_cache import EntryTags

TICKET_BYTES = 16


@dataclass(frozen=True, slots=True)
class RedisNames:
    """The names of one application's keys."""

    namespace: str

    def entry(self, key: bytes, tags: EntryTags) -> str:
        """Of the entry under a cache key."""
        return f"{self.namespace}:e:{_short(tags.model)}:{_short(tags.tenant)}:{key.hex()}"

    def pattern(self, model: str | None, tenant: str | None) -> str:
        """Of all entries of a model and a tenant (None: of any)."""
        parts = ("*" if tag is None else _short(tag) for tag in (model, tenant))
        return f"{self.namespace}:e:{':'.join(parts)}:*"

    def generations(self, tags: EntryTags) -> list[str]:
        """Of the three that an entry depends on."""
        start = f"{self.namespace}:g"
        return [f"{start}:a", f"{start}:m:{_short(tags.model)}", f"{start}:t:{_short(tags.tenant)}"]

    def generation(self, model: str | None, tenant: str | None) -> str:
        """Of the one whose change makes all entries of a model, of a tenant, or of both invalid. Of both, it is
        the tenant's, which is more than was asked, on the safe side."""
        everything, models, tenants = self.generations(EntryTags(model or "", tenant or ""))
        return tenants if tenant is not None else models if model is not None else everything


def is_generation(value: Any) -> bool:
    """Whether what lies under a generation's name may be one."""
    return isinstance(value, bytes) and len(value) == TICKET_BYTES


def ticket_of(generations: list[Any]) -> bytes | None:
    """A digest of three generations; None where one of them is missing, or something else."""
    if not all(map(is_generation, generations)):
        return None
    return hashlib.sha256(b"".join(generations)).digest()[:TICKET_BYTES]


def associated(key: bytes, tags: EntryTags, ticket: bytes | None) -> Associated:
    """What an entry is bound to, besides its bytes."""
    return tags.tenant.encode(), key, ticket or b""


def _short(tag: str) -> str:
    return hashlib.sha256(tag.encode()).hexdigest()[:16]
