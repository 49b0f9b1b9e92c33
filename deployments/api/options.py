"""Priority, timeout and cache of one request: body first, then `x-pimoe-*` headers, then the defaults.

`timeout` in the body of `/v2` needs care. Ours is seconds; Triton's schedule policy, which `tritonclient`
speaks, is an integer of *microseconds*. No float is Triton's, and no integer of 100,000 or more can be
seconds (the longest timeout is a day), so such integers are microseconds: 0.1 s and up. Integers up to
`max_timeout_s` are seconds; those in between could be either and are refused with both readings.

`priority` of both agree where they overlap: Triton's 1 is its highest level, and 1 is our most urgent. Its
further levels (2, 3, ...) are out of our range and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...runtime.errors import InvalidRequestError
from ...runtime.requests import DEFAULT_PRIORITY
from .context import ApiSettings
from .fields import Fields, shown

PRIORITY_HEADER = b"x-pimoe-priority"
TIMEOUT_HEADER = b"x-pimoe-timeout"
CACHE_HEADER = b"x-pimoe-cache"

MICROSECONDS_FROM = 100_000

_FLAGS = {b"true": True, b"1": True, b"false": False, b"0": False}


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How urgent a request is, how long it may take, and whether the cache may answer it."""

    priority: float
    timeout_s: float
    use_cache: bool


def from_headers(headers: dict[bytes, bytes], settings: ApiSettings) -> CallOptions:
    """The options that the headers give, for clients that cannot add body fields."""
    values: dict[str, Any] = {}
    for name, key in ((PRIORITY_HEADER, "priority"), (TIMEOUT_HEADER, "timeout")):
        if name in headers:
            values[key] = _number(name, headers[name])
    if CACHE_HEADER in headers:
        values["cache"] = _FLAGS.get(
            headers[CACHE_HEADER].strip().lower(), headers[CACHE_HEADER].decode("latin-1")
        )
    defaults = CallOptions(DEFAULT_PRIORITY, settings.default_timeout_s, True)
    return read_options(Fields(values, "x-pimoe-"), defaults, settings) if values else defaults


def read_options(
    fields: Fields, defaults: CallOptions, settings: ApiSettings, triton: bool = False
) -> CallOptions:
    """The options that a body gives, over `defaults`.

    Raises:
        InvalidRequestError: a priority outside [0, 1], a timeout not above 0 or too long, a cache not
            boolean.
    """
    priority = fields.number("priority", 0.0, 1.0)
    cache = fields.flag("cache")
    timeout = fields.values.get("timeout")
    if triton and type(timeout) is int and timeout > settings.max_timeout_s:
        timeout_s: float | None = _microseconds(fields, timeout, settings)
    else:
        timeout_s = fields.number("timeout", 0.0, settings.max_timeout_s, above=True)
    return CallOptions(
        priority=defaults.priority if priority is None else priority,
        timeout_s=defaults.timeout_s if timeout_s is None else timeout_s,
        use_cache=defaults.use_cache if cache is None else cache,
    )


def _microseconds(fields: Fields, timeout: int, settings: ApiSettings) -> float:
    limit = int(settings.max_timeout_s * 1_000_000)
    if not MICROSECONDS_FROM <= timeout <= limit:
        seconds = f"seconds, above 0 and up to {settings.max_timeout_s:g}"
        microseconds = f"whole microseconds as Triton has them, from {MICROSECONDS_FROM} to {limit}"
        raise fields.wrong("timeout", f"{seconds}, or {microseconds}")
    return timeout / 1_000_000


def _number(name: bytes, value: bytes) -> float:
    try:
        # float() also reads "1_0"; a header with that is a mistake, not ten.
        return float(value.replace(b"_", b"?"))
    except ValueError:
        text = name.decode()
        raise InvalidRequestError(
            f"{text} is {shown(value.decode('latin-1'))}; it must be a number", text
        ) from None
