"""A client of a Redis server as the cache's second level needs it, and what its errors mean."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigurationError
from .entry import missing
from .redis_limits import RedisLimits

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = logging.getLogger(__name__)

Failure = Literal["timeout", "unavailable", "refused", "busy"]


def client_of(limits: RedisLimits, connections: int) -> Redis:
    """A client with so many connections at most.

    Raises:
        ConfigurationError: a package is missing, or the URL is wrong in a way that the limits do not see.
    """
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        raise missing("redis", "cache.second_level") from None
    try:
        return Redis.from_url(
            limits.url,
            protocol=2,
            max_connections=connections,
            socket_timeout=limits.command_timeout_s,
            socket_connect_timeout=limits.command_timeout_s,
            retry=Retry(NoBackoff(), 0),  # whoever waits has no time for it
            decode_responses=False,
        )
    except (ValueError, TypeError):
        # Its own message may quote the URL.
        raise ConfigurationError("second_level.url is no URL of a Redis server", "url") from None


def failure_of(error: Exception) -> Failure:
    """Why a command failed; what is no fault of the server or the network is logged."""
    import redis.exceptions as known

    if isinstance(error, TimeoutError | known.TimeoutError):
        return "timeout"
    if isinstance(error, known.MaxConnectionsError):
        return "busy"
    if isinstance(error, OSError | known.ConnectionError):
        return "unavailable"
    if not isinstance(error, known.RedisError):
        _log.error("a fault in the cache's second level", exc_info=error)
    return "refused"
