"""Decisions about retries, as pure functions and one counter; no I/O and no clock of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from .settings import RetryPolicy


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds asked for by `retry-after-ms` or `Retry-After` (a number or an HTTP date); None without either."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit_s
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return _until(headers.get("retry-after", ""), now or datetime.now(UTC))


def _until(http_date: str, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(http_date)
    except ValueError:
        return None
    # A date without a zone is UTC by RFC 9110, and cannot be compared until it says so.
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds())


def pause_s(policy: RetryPolicy, retries_done: int, asked_s: float | None, draw: float) -> float:
    """How long to wait before the next try.

    Exponential backoff with full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015). What the server
    asked for is added, so that callers that were turned away together do not come back together.

    Args:
        asked_s: from the answer's headers, if it had any.
        draw: uniform in [0, 1).
    """
    longest = min(policy.max_delay_s, policy.base_delay_s * 2.0 ** min(retries_done, 60))
    return draw * longest + (asked_s or 0.0)


class RetryBudget:
    """Bounds retries to a share of the calls of one client. Not safe across threads: it lives on one loop."""

    def __init__(self, policy: RetryPolicy, now: float) -> None:
        self._policy = policy
        self._balance = policy.budget_burst
        self._refilled = now

    def deposit(self) -> None:
        """One call was made."""
        self._balance = min(self._policy.budget_burst, self._balance + self._policy.budget_ratio)

    def withdraw(self, now: float) -> bool:
        """Takes one retry out, if there is one left."""
        earned = (now - self._refilled) * self._policy.budget_per_s
        self._balance = min(self._policy.budget_burst, self._balance + earned)
        self._refilled = now
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True
