"""Entries of a second level: what goes in comes out, and anything else is refused."""

from __future__ import annotations

import builtins
import os
import struct
from dataclasses import replace
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
import zstandard
from cache_backend import MODEL, generation, inference
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.caching import entry as module
from pimoe.runtime.caching.entry import CachedAnswer, EntryCodec, EntryError, fits, is_storable, parse_key
from pimoe.runtime.errors import ConfigurationError
from pimoe.runtime.requests import InferResult, TensorData, TokenChunk, TokenLogprob

KEY = bytes(range(32))
BOUND = (b"tenant", b"key", b"ticket")
CODECS = {
    "plain": EntryCodec(),
    "zstd": EntryCodec("zstd"),
    "sealed": EntryCodec(key=KEY),
    "sealed-128": EntryCodec(key=KEY[:16]),
    "both": EntryCodec("zstd", KEY),
}


def tensor(values: Any = range(12)) -> TensorData:
    array = np.array(list(values), np.float32)
    return TensorData("float32", (3, len(array) // 3), array.tobytes())


def infer_answer(output: TensorData | None = None) -> CachedAnswer:
    return CachedAnswer("id-1", 1_700_000_000, (InferResult(output or tensor()),))


def generate_answer(tokens: int = 3) -> CachedAnswer:
    logprobs = (TokenLogprob(1, -0.5, ((1, -0.5), (2, float("-inf")))),)
    chunks = [TokenChunk((n,), None, logprobs) for n in range(tokens)]
    return CachedAnswer("id-2", 5, (*chunks, TokenChunk((), "stop")))


def refused(codec: EntryCodec, data: bytes, bound: Any = BOUND) -> str:
    with pytest.raises(EntryError) as raised:
        codec.decode(data, bound)
    return raised.value.reason


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> EntryCodec:
    return CODECS[request.param]


@pytest.mark.parametrize(
    "answer",
    [
        infer_answer(),
        infer_answer(TensorData("int64", (2, 0), b"")),
        infer_answer(TensorData("bfloat16", (4,), np.ones(4, ml_dtypes.bfloat16).tobytes())),
        infer_answer(tensor([1.5] * 30_000)),
        generate_answer(),
        generate_answer(500),
    ],
)
def test_an_answer_comes_back_as_it_was(codec: EntryCodec, answer: CachedAnswer) -> None:
    assert codec.decode(codec.encode(answer, BOUND), BOUND) == answer


def test_any_buffer_is_taken(codec: EntryCodec) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    back = codec.decode(codec.encode(infer_answer(TensorData("float32", (2, 3), array.data)), BOUND), BOUND)
    assert back == infer_answer(TensorData("float32", (2, 3), array.tobytes()))


@settings(deadline=None)
@given(st.data())
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    codec = CODECS[data.draw(st.sampled_from(sorted(CODECS)))]
    entry = bytearray(codec.encode(data.draw(st.sampled_from([infer_answer(), generate_answer()])), BOUND))
    entry[data.draw(st.integers(0, len(entry) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(EntryError):
        codec.decode(bytes(entry), BOUND)


@settings(deadline=None)
@given(st.data())
def test_no_other_length_passes(data: st.DataObject) -> None:
    codec = CODECS[data.draw(st.sampled_from(sorted(CODECS)))]
    entry = codec.encode(infer_answer(), BOUND)
    cut = data.draw(st.integers(0, len(entry) - 1))
    for other in (entry[:cut], entry + entry[: cut + 1], entry[cut + 1 :]):
        with pytest.raises(EntryError):
            codec.decode(other, BOUND)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_no_entry(noise: bytes) -> None:
    for codec in CODECS.values():
        with pytest.raises(EntryError):
            codec.decode(noise, BOUND)
        with pytest.raises(EntryError):
            codec.decode(codec.encode(infer_answer(), BOUND)[:5] + noise, BOUND)


@pytest.mark.parametrize(
    "bound",
    [(b"other", *BOUND[1:]), (b"tenant", b"other", b"ticket"), (*BOUND[:2], b""), (b"tenan", b"tkey", b"ticket")],
)
def test_an_entry_is_bound_to_tenant_key_and_ticket(codec: EntryCodec, bound: Any) -> None:
    reason = refused(codec, codec.encode(infer_answer(), BOUND), bound)
    assert reason == ("undecryptable" if codec._cipher else "corrupt")


def test_keys_do_not_open_each_others_entries() -> None:
    plain = CODECS["plain"].encode(infer_answer(), BOUND)
    sealed = CODECS["sealed"].encode(infer_answer(), BOUND)
    assert refused(CODECS["sealed"], plain) == "undecryptable"  # whoever can write could else leave out the seal
    assert refused(CODECS["plain"], sealed) == "undecryptable"
    assert refused(EntryCodec(key=os.urandom(32)), sealed) == "undecryptable"


def test_a_sealed_entry_shows_nothing_and_never_repeats() -> None:
    secret = TensorData("float32", (4,), b"\x41\x42\x43\x44" * 4)
    entries = [CODECS["sealed"].encode(infer_answer(secret), BOUND) for _ in range(20)]
    assert len(set(entries)) == 20
    assert not any(b"ABCD" in entry or b"float32" in entry for entry in entries)
    assert b"ABCD" in CODECS["plain"].encode(infer_answer(secret), BOUND)


def test_another_version_is_refused_as_such(codec: EntryCodec) -> None:
    entry = bytearray(codec.encode(infer_answer(), BOUND))
    entry[3] = module.SCHEMA + 1
    assert refused(codec, bytes(entry)) == "version"
    entry[3], entry[4] = module.SCHEMA, entry[4] | 0x80
    assert refused(codec, bytes(entry)) == "version"


def test_compression_makes_it_smaller_or_is_left_out() -> None:
    plain, zstd = CODECS["plain"], CODECS["zstd"]
    long, short = infer_answer(tensor([1.0] * 3000)), infer_answer()
    assert len(zstd.encode(long, BOUND)) < len(plain.encode(long, BOUND)) / 10
    assert len(zstd.encode(short, BOUND)) == len(plain.encode(short, BOUND))
    noise = infer_answer(TensorData("int32", (1000,), os.urandom(4000)))
    assert zstd.encode(noise, BOUND)[4] == 0
    assert plain.decode(zstd.encode(long, BOUND), BOUND) == long  # settings may differ between gateways


def forged(payload: bytes, flags: int = 0) -> bytes:
    """An entry whose digest is right, as one who knows the format would make it."""
    head = module._HEAD.pack(b"PMC", module.SCHEMA, flags)
    return head + module._digest(head, BOUND, payload) + payload


def test_a_frame_is_not_opened_beyond_the_limit() -> None:
    codec = EntryCodec("zstd", max_bytes=10_000)
    bomb = zstandard.ZstdCompressor().compress(bytes(10**8))
    assert len(bomb) < 10_000
    assert refused(codec, forged(bomb, flags=1)) == "too_large"
    # A header that claims more than any memory, and one that claims nothing.
    claim = struct.pack("<IBQ", 0xFD2FB528, 0b11100000, 1 << 60)
    assert refused(codec, forged(claim + bytes(20), flags=1)) == "too_large"
    writer = zstandard.ZstdCompressor(write_content_size=False)
    assert refused(codec, forged(writer.compress(bytes(100)), flags=1)) == "corrupt"
    assert refused(codec, forged(b"no frame at all", flags=1)) == "corrupt"


def test_large_entries_are_neither_made_nor_read() -> None:
    codec = EntryCodec(max_bytes=1000)
    big = infer_answer(tensor([1.0] * 3000))
    with pytest.raises(EntryError, match="too_large"):
        codec.encode(big, BOUND)
    assert refused(codec, CODECS["plain"].encode(big, BOUND)) == "too_large"


GOOD: dict[str, Any] = {"t": [1, 2], "f": "stop", "l": [[1, -0.5, [[1, -0.5]], 1], [2, -1.0, [], 2]]}


@pytest.mark.parametrize(
    "plain",
    [
        None,
        {},
        [],
        ["infer", "id", 5],
        ["other", "id", 5, "float32", [1], bytes(4)],
        ["infer", 5, 5, "float32", [1], bytes(4)],
        ["infer", "i" * 600, 5, "float32", [1], bytes(4)],
        ["infer", "id", -5, "float32", [1], bytes(4)],
        ["infer", "id", True, "float32", [1], bytes(4)],
        ["infer", "id", 5, "float31", [1], bytes(4)],
        ["infer", "id", 5, [], [1], bytes(4)],
        ["infer", "id", 5, "float32", [2], bytes(4)],
        ["infer", "id", 5, "float32", [-1, -1], bytes(4)],
        ["infer", "id", 5, "float32", [1.0], bytes(4)],
        ["infer", "id", 5, "float32", 1, bytes(4)],
        ["infer", "id", 5, "float32", [1], "text"],
        ["infer", "id", 5, "float32", [1], struct.pack("<f", float("nan"))],
        ["infer", "id", 5, "float16", [1], b"\x00\x7c"],
        ["infer", "id", 5, "float32", [1], bytes(4), "more"],
        ["generate", "id", 5, []],
        ["generate", "id", 5, None],
        ["generate", "id", 5, [GOOD], 1],
        ["generate", "id", 5, [[1]]],
        ["generate", "id", 5, [{}]],
        ["generate", "id", 5, [GOOD | {"t": ["1"]}]],
        ["generate", "id", 5, [GOOD | {"t": [-1]}]],
        ["generate", "id", 5, [GOOD | {"t": 7}]],
        ["generate", "id", 5, [GOOD | {"f": "error"}]],
        ["generate", "id", 5, [GOOD | {"x": 1}]],
        ["generate", "id", 5, [GOOD | {"l": [[1, float("nan"), [], 1]]}]],
        ["generate", "id", 5, [GOOD | {"l": [[1, float("inf"), [], 1]]}]],
        ["generate", "id", 5, [GOOD | {"l": [[1, -1.0, [[1, "x"]], 1]]}]],
        ["generate", "id", 5, [GOOD | {"l": [[1, -1.0]]}]],
        ["generate", "id", 5, [GOOD | {"l": 3}]],
    ],
)
def test_a_payload_is_checked_in_every_part(plain: Any) -> None:
    good = ["generate", "id", 5, [GOOD]]
    assert CODECS["plain"].decode(forged(msgpack.packb(good)), BOUND).items[0].finish_reason == "stop"  # type: ignore[union-attr]
    assert refused(CODECS["plain"], forged(msgpack.packb(plain))) == "corrupt"


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xc7\x01\x05x", b"\x91" * 2000])
def test_a_payload_that_is_no_msgpack_is_refused(payload: bytes) -> None:
    assert refused(CODECS["plain"], forged(payload)) == "corrupt"


def test_an_answer_fits_its_request_or_does_not() -> None:
    def of(*chunks: TokenChunk) -> CachedAnswer:
        return CachedAnswer("id", 1, chunks)

    request = generation(max_tokens=3)
    end = TokenChunk((255,), "stop")
    assert fits(of(TokenChunk((0, 1)), end), MODEL, request)
    for wrong in (
        of(),
        of(TokenChunk((1,))),
        of(end, end),
        of(TokenChunk((0, 1, 2)), end),
        of(TokenChunk((256,), "stop")),
        of(TokenChunk((1, 2), "stop", (TokenLogprob(1, -1.0),))),
        infer_answer(),
    ):
        assert not fits(wrong, MODEL, request)
    asked = inference()
    right = TensorData("float32", (2, 4), bytes(32))
    assert fits(infer_answer(right), MODEL, asked)
    for output in (replace(right, shape=(4, 2)), replace(right, dtype="int32")):
        assert not fits(infer_answer(output), MODEL, asked)
    assert not fits(CachedAnswer("id", 1, infer_answer(right).items * 2), MODEL, asked)
    assert not fits(of(end), MODEL, asked)


def test_what_is_no_number_is_not_stored() -> None:
    assert is_storable(TokenChunk((1,), None, (TokenLogprob(1, float("-inf"), ((2, float("-inf")),)),)))
    assert not is_storable(TokenChunk((1,), None, (TokenLogprob(1, float("nan")),)))
    assert not is_storable(TokenChunk((1,), None, (TokenLogprob(1, -1.0, ((2, float("nan")),)),)))
    assert not is_storable(InferResult(tensor([float("inf")] * 3)))


@pytest.mark.parametrize("text", ["ab" * 15, "ab" * 24, "zz" * 16, "a", "0x" + "ab" * 16])
def test_a_wrong_key_is_named_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_key(text)
    assert raised.value.param == "encryption_key"
    assert text not in repr(raised.value).replace("'encryption_key'", "") or len(text) == 1


def test_right_keys() -> None:
    assert [len(parse_key("ab" * size)) for size in (0, 16, 32)] == [0, 16, 32]


@pytest.mark.parametrize(
    ("package", "make"),
    [("zstandard", lambda: EntryCodec("zstd")), ("cryptography", lambda: EntryCodec(key=KEY))],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, make: Any) -> None:
    real = builtins.__import__

    def no_package(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **options)

    entry = CODECS["zstd"].encode(infer_answer(tensor([1.0] * 3000)), BOUND)
    monkeypatch.setattr(builtins, "__import__", no_package)
    with pytest.raises(ConfigurationError, match=r"pimoe\[cache\]") as raised:
        make()
    assert package in raised.value.message
    if package == "zstandard":  # written by another gateway, which has it
        assert refused(CODECS["plain"], entry) == "version"
