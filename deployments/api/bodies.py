"""Reading a request body within its limit, and decoding JSON and msgpack without trust."""

from __future__ import annotations

from typing import Any

import msgpack
import orjson

from ...runtime.errors import InvalidRequestError, PayloadTooLargeError, RequestCancelledError
from .errors import UnsupportedMediaTypeError
from .lifetime import Receive

MSGPACK_TYPES = frozenset((b"application/msgpack", b"application/x-msgpack", b"application/vnd.msgpack"))

# A map of ours has less than ten keys; shapes and lists of tensors are short.
_MAX_MAP_ITEMS = 64
_MIN_ARRAY_ITEMS = 64
_MAX_STR_BYTES = 1 << 16


def media_type(headers: dict[bytes, bytes]) -> bytes:
    """The content type without its parameters, in lower case; empty where there is none."""
    return headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()


def check_headers(headers: dict[bytes, bytes], limit_bytes: int) -> None:
    """Refuses what needs no body to be refused.

    Raises:
        PayloadTooLargeError: the announced length is over the limit.
        UnsupportedMediaTypeError: the body is compressed (a few bytes could become gigabytes).
    """
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b""):
        raise UnsupportedMediaTypeError("compressed bodies are not accepted; send it uncompressed")
    length = headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length) > limit_bytes:
        raise too_large(limit_bytes)


def too_large(limit_bytes: int, what: str = "the body") -> PayloadTooLargeError:
    """The error for `what` being over `limit_bytes`."""
    return PayloadTooLargeError(f"{what} is larger than the limit of {limit_bytes} bytes")


async def read_body(receive: Receive, limit_bytes: int) -> bytes:
    """The whole body, without a copy where it arrives in one piece.

    Raises:
        PayloadTooLargeError: it grew over the limit; what had arrived is dropped.
        RequestCancelledError: the client left before its end.
        InvalidRequestError: it is empty.
    """
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestCancelledError("the client closed the connection before the end of its request")
        part: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(part)
        if size > limit_bytes:
            raise too_large(limit_bytes)
        if part:
            parts.append(part)
    if not parts:
        raise InvalidRequestError("the body is empty")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decode_json(body: bytes | memoryview, limit_bytes: int) -> Any:
    """JSON to plain values; NaN, Infinity, invalid UTF-8 and deep nesting are no JSON here.

    Raises:
        PayloadTooLargeError, InvalidRequestError.
    """
    if len(body) > limit_bytes:
        raise too_large(limit_bytes, "the JSON part of the body")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None


def decode_msgpack(body: bytes, max_array_items: int) -> Any:
    """msgpack to plain values. Extension types are refused, and lengths are bounded, since the decoder
    allocates an array by the length that its header claims.

    Raises:
        InvalidRequestError: malformed, or over these limits.
    """
    try:
        return msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            ext_hook=_refuse_extension,
            max_str_len=_MAX_STR_BYTES,
            max_map_len=_MAX_MAP_ITEMS,
            max_array_len=max(max_array_items, _MIN_ARRAY_ITEMS),
        )
    except (ValueError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise InvalidRequestError(f"the body is not valid msgpack: {reason[:200]}") from None


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not accepted")
