"""Where the second level's server is, and its bounds. Plain values: whoever only configures needs no redis."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ..errors import ConfigurationError
from .entry import COMPRESSIONS, parse_key

SCHEMES = ("redis", "rediss", "unix")

_NAMESPACE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # nothing that a pattern of SCAN would read as its own


@dataclass(frozen=True, slots=True)
class RedisLimits:
    """Where the server is, and its bounds.

    Attributes:
        url: redis://, rediss:// (TLS) or unix://; may hold a password, and is never shown.
        namespace: in front of all keys, so that applications may share a server.
        ttl_s: age after which the server forgets an entry.
        lookup_timeout_s: a lookup that takes longer is a miss.
        command_timeout_s: for connecting, for a write, and for each command of a flush; a connection on which
            nothing comes for so long is given up.
        max_connections: of lookups; writes and flushes have two more.
        max_entry_bytes: larger answers are neither stored nor read.
        max_pending_entries, max_pending_bytes: of answers that wait to be stored; those beyond are not.
        compression: "zstd" or "none".
        encryption_key: of AES-GCM, 16 or 32 bytes in hexadecimal; empty: entries are not encrypted.
        breaker_failures: so many failures in a row, and the server is given up ...
        breaker_retry_s: ... except for one lookup every so many seconds.

    Raises:
        ConfigurationError: a value is wrong. No message shows `url` or `encryption_key`.
    """

    url: str = field(repr=False)
    namespace: str = "pimoe"
    ttl_s: float = 86_400.0
    lookup_timeout_s: float = 0.05
    command_timeout_s: float = 1.0
    max_connections: int = 16
    max_entry_bytes: int = 16 * 2**20
    max_pending_entries: int = 1024
    max_pending_bytes: int = 64 * 2**20
    compression: str = "zstd"
    encryption_key: str = field(default="", repr=False)
    breaker_failures: int = 5
    breaker_retry_s: float = 1.0

    def __post_init__(self) -> None:
        if _scheme(self.url) not in SCHEMES:
            allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise ConfigurationError(f"second_level.url must begin with one of {allowed}", "url")
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 < value < float("inf"):
                raise ConfigurationError(f"second_level.{name} is {value}; it must be above 0", name)
        if not _NAMESPACE.fullmatch(self.namespace):
            right = "it must be up to 64 letters, digits and _ . : -"
            raise ConfigurationError(f"second_level.namespace is {self.namespace!r}; {right}", "namespace")
        if self.compression not in COMPRESSIONS:
            right = f"it must be one of {', '.join(COMPRESSIONS)}"
            raise ConfigurationError(f"second_level.compression is {self.compression!r}; {right}", "compression")
        parse_key(self.encryption_key)

    @property
    def shown(self) -> str:
        """The server, for logs: without user, password and options."""
        parts = urlsplit(self.url)
        place = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
        return f"{parts.scheme}://{place}"


def _scheme(url: str) -> str:
    try:
        parts = urlsplit(url)
        return parts.scheme if parts.port != 0 else ""
    except ValueError:  # a port that is no number, or half an IPv6 address
        return ""
