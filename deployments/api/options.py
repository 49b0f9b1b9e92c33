"""Priority, timeout, cache and mode of one request: body first, then `x-pimoe-*` headers, then the defaults. And
its tenant, a header only: whoever authenticates callers in front of pimoe sets it, and drops what a caller sends.

`timeout` in the body of `/v2` needs care. Ours is seconds; Triton's schedule policy, which `tritonclient`
speaks, is an integer of *microseconds*. No float is Triton's, and no integer of 100,000 or more can be
seconds (the longest timeout is a day), so such integers are microseconds: 0.1 s and up. Integers up to
`max_timeout_s` are seconds; those in between could be either and are refused with both readings.

`priority` is a number from 0 to 1 or the name of a class: batch (0), default (0.5), interactive (1). Ours and
Triton's agree where they overlap: Triton's 1 is its highest level, and 1 is our most urgent. Its further levels
(2, 3, ...) are out of our range and are refused. OpenAI's `service_tier` maps onto it; `priority` wins.

Serve's own header, `x-request-timeout-seconds`, bounds whatever else is said, as it does for any application; a
value that is not above 0 bounds nothing, as with Serve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...runtime.batching import NAMED_PRIORITIES, SERVICE_TIERS
from ...runtime.caching import BypassReason
from ...runtime.errors import InvalidRequestError
from ...runtime.requests import DEFAULT_PRIORITY
from .context import ApiSettings
from .fields import Fields, shown
from .known_answers import ReadHeaders
from .modes import MODE_NAMES, NO_MODE, ModeName, Truncation

PRIORITY_HEADER = b"x-pimoe-priority"
TIMEOUT_HEADER = b"x-pimoe-timeout"
SERVE_TIMEOUT_HEADER = b"x-request-timeout-seconds"
CACHE_HEADER = b"x-pimoe-cache"
TENANT_HEADER = b"x-pimoe-tenant"
MODE_HEADER = b"x-pimoe-mode"

MICROSECONDS_FROM = 100_000

MAX_TENANT_CHARS = 128
TENANT_RULE = f"at most {MAX_TENANT_CHARS} characters of visible ASCII, without spaces"

_OWN_PREFIX = b"x-pimoe-"
_READ = frozenset((b"content-type", b"content-encoding", b"inference-header-content-length", SERVE_TIMEOUT_HEADER))
_KEPT = 256

_FLAGS = {b"true": True, b"1": True, b"false": False, b"0": False}


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How urgent a request is, how long it may take, whether the cache may answer it, and whose it is.

    Attributes:
        longest_s: what Serve's header bounds the time to, whatever the body asks for.
        tenant: the cache keeps tenants apart; empty: nobody in particular.
        mode: the preset of a generation, see `modes.py`; None for none.
    """

    priority: float
    timeout_s: float
    use_cache: bool
    longest_s: float = math.inf
    tenant: str = ""
    mode: ModeName | None = None

    @property
    def bypass(self) -> BypassReason | None:
        """Why the cache is to leave the request alone; None: it may answer."""
        return None if self.use_cache else "asked"


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> ReadHeaders:
    """Those of all headers that decide anything, apart from the length of the body and the request's id."""
    return tuple([header for header in headers if header[0] in _READ or header[0][:8].lower() == _OWN_PREFIX])


class HeaderOptions:
    """The options that headers give, remembered: a client sends the same ones each time."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._known: dict[ReadHeaders, CallOptions] = {}

    def read(self, headers: ReadHeaders) -> CallOptions:
        """Raises: InvalidRequestError, as `from_headers` and `check_one_tenant`."""
        if (options := self._known.get(headers)) is None:
            check_one_tenant(headers)
            options = from_headers(dict(headers), self._settings)
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[headers] = options
        return options


def from_headers(headers: dict[bytes, bytes], settings: ApiSettings) -> CallOptions:
    """The options that the headers give, for clients that cannot add body fields.

    Raises:
        InvalidRequestError: as `read_options`, and for a tenant that is no short, visible ASCII.
    """
    values: dict[str, Any] = {}
    if PRIORITY_HEADER in headers:
        name = headers[PRIORITY_HEADER].strip().decode("latin-1")
        values["priority"] = name if name.isalpha() else _number(PRIORITY_HEADER, headers[PRIORITY_HEADER])
    if TIMEOUT_HEADER in headers:
        values["timeout"] = _number(TIMEOUT_HEADER, headers[TIMEOUT_HEADER])
    if CACHE_HEADER in headers:
        values["cache"] = _FLAGS.get(
            headers[CACHE_HEADER].strip().lower(), headers[CACHE_HEADER].decode("latin-1")
        )
    if MODE_HEADER in headers:
        values["mode"] = headers[MODE_HEADER].strip().decode("latin-1")
    longest_s, tenant = _longest_s(headers), read_tenant(headers.get(TENANT_HEADER, b""))
    timeout_s = min(settings.default_timeout_s, longest_s)
    defaults = CallOptions(DEFAULT_PRIORITY, timeout_s, True, longest_s, tenant, settings.default_mode)
    return read_options(Fields(values, "x-pimoe-"), defaults, settings) if values else defaults


def read_options(
    fields: Fields, defaults: CallOptions, settings: ApiSettings, triton: bool = False
) -> CallOptions:
    """The options that a body gives, over `defaults`.

    Raises:
        InvalidRequestError: a priority outside [0, 1], a timeout not above 0 or too long, a cache not
            boolean.
    """
    priority = _priority(fields)
    cache = fields.flag("cache")
    timeout = fields.values.get("timeout")
    if triton and type(timeout) is int and timeout > settings.max_timeout_s:
        timeout_s: float | None = _microseconds(fields, timeout, settings)
    else:
        timeout_s = fields.number("timeout", 0.0, settings.max_timeout_s, above=True)
    return CallOptions(
        priority=defaults.priority if priority is None else priority,
        timeout_s=defaults.timeout_s if timeout_s is None else min(timeout_s, defaults.longest_s),
        use_cache=defaults.use_cache if cache is None else cache,
        longest_s=defaults.longest_s,
        tenant=defaults.tenant,
        mode=_mode(fields, defaults.mode),
    )


def read_truncation(fields: Fields) -> Truncation | None:
    """Whether messages may be left out, where the body says so; see `Chosen`.

    Raises:
        InvalidRequestError: neither of the two words.
    """
    text = fields.text("truncation")
    if text not in (None, "auto", "disabled"):
        raise fields.wrong("truncation", "auto or disabled")
    return None if text is None else "auto" if text == "auto" else "disabled"


def is_tenant(text: str) -> bool:
    """Whether a tenant may be called so: `TENANT_RULE`."""
    return len(text) <= MAX_TENANT_CHARS and all("!" <= char <= "~" for char in text)


def check_one_tenant(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuses a request with two tenants: whose it is must not depend on which of them is read.

    Args:
        headers: as they came, in a list.

    Raises:
        InvalidRequestError.
    """
    if sum(header.lower() == TENANT_HEADER for header, _ in headers) > 1:
        name = TENANT_HEADER.decode()
        raise InvalidRequestError(f"{name} is there more than once; it must be there once at most", name)


def read_tenant(value: bytes) -> str:
    """A tenant's name as the header has it; empty: nobody in particular.

    Raises:
        InvalidRequestError: it is not `TENANT_RULE`.
    """
    text = value.decode("latin-1")
    if not is_tenant(text):
        name = TENANT_HEADER.decode()
        raise InvalidRequestError(f"{name} is {shown(text)}; it must be {TENANT_RULE}", name)
    return text


def _priority(fields: Fields) -> float | None:
    tier = fields.text("service_tier")
    if tier is not None and tier != "auto" and tier not in SERVICE_TIERS:
        raise fields.wrong("service_tier", f"auto or one of {', '.join(SERVICE_TIERS)}")
    given = fields.values.get("priority")
    if given is None:
        return SERVICE_TIERS.get(tier or "auto")
    if isinstance(given, str):
        if given not in NAMED_PRIORITIES:
            raise fields.wrong("priority", f"a number from 0 to 1, or one of {', '.join(NAMED_PRIORITIES)}")
        return NAMED_PRIORITIES[given]
    return fields.number("priority", 0.0, 1.0)


def _mode(fields: Fields, default: ModeName | None) -> ModeName | None:
    name = fields.text("mode")
    if name is None:
        return default
    if name != NO_MODE and name not in MODE_NAMES:
        raise fields.wrong("mode", f"one of {', '.join(MODE_NAMES)} or {NO_MODE}")
    return next((known for known in MODE_NAMES if known == name), None)


def _longest_s(headers: dict[bytes, bytes]) -> float:
    try:
        longest_s = float(headers.get(SERVE_TIMEOUT_HEADER, b"inf"))
    except ValueError:
        return math.inf
    return longest_s if longest_s > 0 else math.inf


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
