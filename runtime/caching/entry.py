"""How an answer lies in a second level: bytes that are refused, as a whole, unless all of them fit.

    "PMC" · schema (1 byte) · flags (1 byte) · digest (32 bytes) · payload             in the open
    "PMC" · schema (1 byte) · flags (1 byte) · nonce (12 bytes) · AES-GCM(payload)     encrypted

The payload is msgpack, perhaps in one zstd frame. The digest is SHA-256 over head, associated data and payload;
AES-GCM authenticates the same. What is associated (tenant, cache key, generation of the store) is not in the
entry: whoever reads must know it, so that an entry moved under another key, or to another tenant, opens for
nobody. The digest is against accidents; against a store whose writers are not trusted only encryption helps. With
random nonces one encryption key is good for 2^32 entries (NIST SP 800-38D): change it before that.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgpack

from ..errors import ConfigurationError
from ..numerics import all_finite
from ..requests import (
    DTYPE_BYTES,
    GenerateRequest,
    InferRequest,
    InferResult,
    ModelInfo,
    TensorData,
    TokenChunk,
)

Associated: TypeAlias = tuple[bytes, ...]

SCHEMA = 2
COMPRESSIONS = ("none", "zstd")

_HEAD = struct.Struct("<3sBB")
_MAGIC = b"PMC"
_ZSTD, _SEALED = 1, 2
_DIGEST_BYTES = 32
_NONCE_BYTES, _TAG_BYTES = 12, 16
_COMPRESS_FROM_BYTES = 256
_MAX_ID_CHARS = 512
_ENVELOPE_BYTES = 2048  # around a payload's numbers: identity, dtype, shape
HEAD_BYTES = _HEAD.size + _DIGEST_BYTES  # the larger of both kinds


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """What an entry holds: the items as computed, and the identity of the response that they were first given in,
    so that a cached answer is the computed one byte for byte."""

    response_id: str
    created_s: int
    items: tuple[InferResult | TokenChunk, ...]


class EntryError(Exception):
    """The bytes are no entry for this reader. `reason` is a fixed word, for statistics."""

    def __init__(self, reason: Literal["version", "corrupt", "undecryptable", "too_large"]) -> None:
        super().__init__(reason)
        self.reason = reason


class EntryCodec:
    """Answers to bytes and back.

    Args:
        compression: "zstd" where it makes an entry smaller, or "none".
        key: AES-GCM key of 16 or 32 bytes; empty: entries are in the open, and sealed ones are refused. With a
            key it is the open ones that are.
        max_bytes: of a payload, on both ways; what a compressed one claims to hold is held against it first.

    Raises:
        ConfigurationError: the key's length is wrong, or a package is missing.
    """

    def __init__(self, compression: str = "none", key: bytes = b"", max_bytes: int = 16 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._compress = _compressor() if compression == "zstd" else None
        self._cipher = _cipher(key) if key else None

    @property
    def max_entry_bytes(self) -> int:
        """Longest entry that can be right."""
        return self.max_bytes + HEAD_BYTES + _ENVELOPE_BYTES

    def encode(self, answer: CachedAnswer, associated: Associated) -> bytes:
        """The entry.

        Raises:
            EntryError: it would be too large.
        """
        payload: bytes = msgpack.packb(_plain(answer), use_bin_type=True)
        if len(payload) > self.max_bytes + _ENVELOPE_BYTES:
            raise EntryError("too_large")
        flags = 0
        if self._compress is not None and len(payload) >= _COMPRESS_FROM_BYTES:
            packed = self._compress(payload)
            if len(packed) < len(payload):
                payload, flags = packed, _ZSTD
        if self._cipher is None:
            head = _HEAD.pack(_MAGIC, SCHEMA, flags)
            return b"".join((head, _digest(head, associated, payload), payload))
        head, nonce = _HEAD.pack(_MAGIC, SCHEMA, flags | _SEALED), os.urandom(_NONCE_BYTES)
        return b"".join((head, nonce, self._cipher.encrypt(nonce, payload, _joined(head, associated))))

    def decode(self, entry: bytes, associated: Associated) -> CachedAnswer:
        """The answer, which is whole and finite.

        Raises:
            EntryError: anything at all is not as `encode` leaves it.
        """
        if len(entry) > self.max_entry_bytes:
            raise EntryError("too_large")
        if len(entry) < _HEAD.size + _NONCE_BYTES + _TAG_BYTES or entry[:3] != _MAGIC:
            raise EntryError("corrupt")
        head, schema, flags = entry[: _HEAD.size], entry[3], entry[4]
        if schema != SCHEMA or flags & ~(_ZSTD | _SEALED):
            raise EntryError("version")
        payload = self._open(head, bool(flags & _SEALED), entry[_HEAD.size :], associated)
        if flags & _ZSTD:
            payload = _decompressed(payload, self.max_bytes + _ENVELOPE_BYTES)
        try:
            return _answer(msgpack.unpackb(payload, raw=False, strict_map_key=True, max_ext_len=0))
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise EntryError("corrupt") from error

    def _open(self, head: bytes, sealed: bool, body: bytes, associated: Associated) -> bytes:
        if sealed != (self._cipher is not None):
            raise EntryError("undecryptable")
        if self._cipher is None:
            digest, payload = body[:_DIGEST_BYTES], body[_DIGEST_BYTES:]
            if digest != _digest(head, associated, payload):
                raise EntryError("corrupt")
            return payload
        from cryptography.exceptions import InvalidTag

        try:
            nonce, sealed_payload = body[:_NONCE_BYTES], body[_NONCE_BYTES:]
            opened: bytes = self._cipher.decrypt(nonce, sealed_payload, _joined(head, associated))
        except InvalidTag:
            raise EntryError("undecryptable") from None
        return opened


def parse_key(text: str) -> bytes:
    """An encryption key from settings: 16 or 32 bytes in hexadecimal; empty for none.

    Raises:
        ConfigurationError: it is something else. The message does not show it.
    """
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b"?"
    if len(key) not in (0, 16, 32):
        raise ConfigurationError(
            "the cache's encryption key must be 16 or 32 bytes in hexadecimal (32 or 64 digits)", "encryption_key"
        )
    return key


def fits(answer: CachedAnswer, model: ModelInfo, request: InferRequest | GenerateRequest) -> bool:
    """Whether it can be the answer to this very request: shape and dtype, or token ids, their number and end."""
    if isinstance(request, InferRequest):
        wanted = request.hidden_states
        outputs = [item.output for item in answer.items if isinstance(item, InferResult)]
        found = [(output.dtype, tuple(output.shape)) for output in outputs]
        return len(answer.items) == 1 and found == [(wanted.dtype, tuple(wanted.shape))]
    chunks = [item for item in answer.items if isinstance(item, TokenChunk)]
    if not chunks or len(chunks) != len(answer.items):
        return False
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    return (
        [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        and len(tokens) <= request.sampling.max_tokens
        and all(0 <= token < model.vocab_size for token in tokens)
        and all(chunk.logprobs is None or len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    )


def is_storable(item: InferResult | TokenChunk) -> bool:
    """Whether its numbers are numbers. A logprob of minus infinity is one: of a token that was ruled out."""
    if isinstance(item, InferResult):
        return all_finite(item.output)
    logprobs = [each for each in (*(item.logprobs or ()), *(item.prompt_logprobs or ())) if each is not None]
    return all(_is_logprob(p) for each in logprobs for p in (each.logprob, *(p for _, p in each.top)))


def _is_logprob(value: float) -> bool:
    return not math.isnan(value) and value != math.inf


def _plain(answer: CachedAnswer) -> list[Any]:
    identity = (answer.response_id, answer.created_s)
    first = answer.items[0]
    if isinstance(first, InferResult):
        output = first.output
        data = memoryview(output.data).cast("B") if output.nbytes else b""
        return ["infer", *identity, output.dtype, output.shape, data]
    chunks = [item.to_wire() for item in answer.items if isinstance(item, TokenChunk)]
    return ["generate", *identity, chunks]


def _answer(plain: Any) -> CachedAnswer:
    """Raises: ValueError, TypeError, KeyError: it is not what `_plain` gives."""
    kind, response_id, created_s, *rest = plain
    _must(type(response_id) is str and len(response_id) <= _MAX_ID_CHARS)
    _must(type(created_s) is int and created_s >= 0)
    if kind == "infer":
        (dtype, shape, data) = rest
        return CachedAnswer(response_id, created_s, (_result(dtype, shape, data),))
    _must(kind == "generate" and len(rest) == 1 and type(rest[0]) is list and len(rest[0]) > 0)
    return CachedAnswer(response_id, created_s, tuple(map(_chunk, rest[0])))


def _result(dtype: Any, shape: Any, data: Any) -> InferResult:
    _must(type(data) is bytes and type(shape) is list and all(type(size) is int and size >= 0 for size in shape))
    _must(len(data) == math.prod(shape) * DTYPE_BYTES[dtype])
    output = TensorData(dtype, tuple(shape), data)
    _must(all_finite(output))
    return InferResult(output)


def _chunk(wire: Any) -> TokenChunk:
    _must(type(wire) is dict and wire.keys() <= {"t", "f", "l", "p", "c"})
    _must(all(type(token) is int and token >= 0 for token in wire["t"]))
    _must(wire.get("f") in (None, "stop", "length"))
    _must(type(wire.get("c", 0)) is int and wire.get("c", 0) >= 0)
    for item in (*(wire.get("l") or ()), *(wire.get("p") or ())):
        if item is not None:
            token, logprob, top, rank = item
            _must(
                type(rank) is int and all(type(i) is int and type(p) is float for i, p in ((token, logprob), *top))
            )
    chunk = TokenChunk.from_wire(wire)
    _must(is_storable(chunk))
    return chunk


def _must(right: bool) -> None:
    if not right:
        raise ValueError("no entry")


def _joined(head: bytes, associated: Associated) -> bytes:
    """Each with its length in front, so that no two lists read alike."""
    return head + b"".join(struct.pack("<Q", len(part)) + part for part in associated)


def _digest(head: bytes, associated: Associated, payload: bytes) -> bytes:
    digest = hashlib.sha256(_joined(head, associated))
    digest.update(payload)
    return digest.digest()


def missing(package: str, what: str) -> ConfigurationError:
    """The error for a package that is not installed."""
    return ConfigurationError(f"{what} needs the package {package}: pip install 'pimoe[cache]'", "second_level")


def _compressor() -> Callable[[bytes], bytes]:
    try:
        import zstandard
    except ImportError:
        raise missing("zstandard", "cache.second_level.compression: zstd") from None
    return zstandard.ZstdCompressor(level=1).compress


def _decompressed(frame: bytes, max_bytes: int) -> bytes:
    """The frame's content. What it claims to hold is looked at first: the decoder allocates that much at once."""
    try:
        import zstandard
    except ImportError:  # written by a gateway with other settings than this one
        raise EntryError("version") from None
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= max_bytes:
            raise EntryError("too_large" if size > max_bytes else "corrupt")
        payload: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        raise EntryError("corrupt") from None
    return payload


def _cipher(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise missing("cryptography", "cache.second_level.encryption_key") from None
    return AESGCM(key)
