"""Text out of tokens: stop strings wherever tokens and characters break, and tensors' numbers."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_gateway import EOS, HIDDEN, MODEL, ByteCodec, logprob
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pimoe.deployments.api import wire
from pimoe.deployments.api.assembly import Assembler, Piece, TextRules, pieces
from pimoe.runtime.errors import InvalidTensorError
from pimoe.runtime.generation.stopping import first_stop
from pimoe.runtime.model.tokenizer import Tokenizer
from pimoe.runtime.numerics import all_finite
from pimoe.runtime.requests import TensorData, TokenChunk
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend


def assemble(ids: list[int], sizes: list[int], rules: TextRules, reason: Any = "length") -> list[Piece]:
    """The pieces that chunks of those sizes make, up to the one that ends the text."""
    assembler = Assembler(ByteCodec(), rules)
    made: list[Piece] = []
    start = 0
    while start < len(ids):
        end = min(len(ids), start + sizes[len(made) % len(sizes)])
        part = tuple(ids[start:end])
        marks = tuple(logprob(token, 1) for token in part)
        made.append(assembler.push(TokenChunk(part, reason if end == len(ids) else None, marks)))
        if made[-1].finish_reason is not None:
            break
        start = end
    return made


def text_of(found: list[Piece]) -> str:
    return "".join(piece.text for piece in found)


@settings(deadline=None)
@given(
    text=st.text("abé", max_size=30),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=4).map(tuple),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_text_ends_before_the_first_stop_however_it_is_cut(
    text: str, stops: tuple[str, ...], sizes: list[int]
) -> None:
    ids = list(text.encode())
    found = assemble(ids, sizes, TextRules(stop=stops)) if ids else []
    # Byte by byte the stop that completes first wins, which is not always the one that begins first.
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        assert text_of(found) == text
        assert not found or found[-1].finish_reason == "length"
        return
    upto = text[: min(ends)]
    found_at = first_stop(upto, stops)
    assert found_at is not None
    expected = upto[: found_at[0]]
    assert text_of(found) == expected
    assert found[-1].finish_reason == "stop"
    assert all(piece.finish_reason is None for piece in found[:-1])
    assert [token for piece in found for token in piece.token_ids] == list(upto.encode())


@settings(deadline=None)
@given(text=st.text(max_size=20), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_text_without_stops_is_whole(text: str, sizes: list[int]) -> None:
    ids = [*text.encode(), EOS]
    rules = TextRules(terminators=frozenset((EOS,)), logprobs=True)
    found = assemble(ids, sizes, rules, "stop")
    assert text_of(found) == text
    offsets = [offset for piece in found for offset in piece.offsets]
    assert len(offsets) == len(ids) == sum(len(piece.logprobs) for piece in found)
    assert offsets == sorted(offsets)
    assert offsets[-1] == len(text)


async def test_a_stop_string_ends_the_generation_at_once() -> None:
    closed: list[bool] = []

    async def chunks() -> AsyncGenerator[TokenChunk, None]:
        try:
            for token in b"abcdef":
                yield TokenChunk((token,))
        finally:
            closed.append(True)

    found = [piece async for piece in pieces(chunks(), Assembler(ByteCodec(), TextRules(stop=("c",))))]
    assert text_of(found) == "ab"
    assert closed == [True]


def test_nothing_that_may_become_a_stop_is_sent_early() -> None:
    found = assemble(list(b"xENxEND"), [1], TextRules(stop=("END",)))
    assert [piece.text for piece in found] == ["x", "", "", "ENx", "", "", ""]


def test_held_text_comes_out_at_the_end() -> None:
    found = assemble(list(b"abEN"), [1], TextRules(stop=("END",)))
    assert [piece.text for piece in found] == ["a", "b", "", "EN"]
    assert found[-1].finish_reason == "length"


def test_a_stop_does_not_end_before_min_tokens() -> None:
    rules = TextRules(stop=("b",), min_tokens=4)
    assert text_of(assemble(list(b"abcbabc"), [1], rules)) == "abc"
    # The token that reaches the minimum may complete a stop that began before it.
    assert text_of(assemble(list(b"abcEND"), [1], TextRules(stop=("cE",), min_tokens=4))) == "ab"


def test_a_terminator_has_no_text_but_counts() -> None:
    stop_token = ord("!")
    rules = TextRules(terminators=frozenset((stop_token,)))
    [piece] = assemble(list(b"hi!"), [10], rules, "stop")
    assert (piece.text, piece.token_ids) == ("hi", (104, 105, 33))
    # In the middle, or at a length limit, it is a token like any other.
    [piece] = assemble(list(b"h!i!"), [10], rules, "length")
    assert piece.text == "h!i!"


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    assert text_of(assemble([97, 0xC3], [1], TextRules())) == "a\ufffd"


def test_the_last_chunk_may_be_empty() -> None:
    assembler = Assembler(ByteCodec(), TextRules(stop=("END",)))
    assert assembler.push(TokenChunk((69, 78))).text == ""
    piece = assembler.push(TokenChunk((), "length"))
    assert (piece.text, piece.finish_reason) == ("EN", "length")


# Spaces at the beginning, and special tokens


def spaced(folder: Path) -> Tokenizer:
    """As Llama's and Mixtral's: words carry the space in front of them, and decoding strips the first."""
    words = ["\u2581", "\u2581a", "a", "\u2581\u2581", "b"]
    vocabulary = {"<unk>": 0, "</s>": 1, "[CALL]": 2, **{word: 3 + index for index, word in enumerate(words)}}
    backend = Backend(
        models.BPE(vocab=vocabulary, merges=[("\u2581", "a"), ("\u2581", "\u2581")], unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "</s>", "[CALL]")])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def spaced_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return spaced(tmp_path_factory.mktemp("spaced"))


IDS = {"\u2581": 3, "\u2581a": 4, "a": 5, "\u2581\u2581": 6, "b": 7, "[CALL]": 2}


@settings(deadline=None)
@given(
    words=st.lists(st.sampled_from(sorted(IDS)), min_size=1, max_size=8),
    size=st.integers(1, 4),
    stop=st.sampled_from([(), ("zz",), ("a  a",)]),
)
def test_a_text_begins_anew_or_goes_on(
    words: list[str], size: int, stop: tuple[str, ...], spaced_tokenizer: Tokenizer
) -> None:
    tokenizer = spaced_tokenizer
    ids = [IDS[word] for word in words]
    chunks = [TokenChunk(tuple(ids[at : at + size])) for at in range(0, len(ids), size)]
    for anew in (True, False):
        assembler = Assembler(tokenizer, TextRules(anew=anew, stop=stop), (5,))
        made = [assembler.push(chunk) for chunk in [*chunks, TokenChunk((), "length")]]
        going_on = "".join(word for word in words if word != "[CALL]").replace("\u2581", " ")
        at = going_on.find(stop[0]) if stop else -1
        expected = going_on if at < 0 else going_on[:at]
        if anew and expected.startswith(" "):
            expected = expected[1:]
            assert at >= 0 or expected == tokenizer.decode(ids)
        assert "".join(piece.text for piece in until_finished(made)) == expected


def until_finished(found: list[Piece]) -> list[Piece]:
    last = next(at for at, piece in enumerate(found) if piece.finish_reason is not None)
    return found[: last + 1]


def test_visible_special_tokens_stand_where_they_came(tmp_path: Path) -> None:
    tokenizer = spaced(tmp_path)
    rules = TextRules(anew=True, visible=frozenset((2,)), stop=("a a",))
    for size in (1, 2, 5, 9):
        ids = [2, 4, 2, 5, 2, 4, 2, 7]  # " a" "a" " a" and "b", the mark before each
        assembler = Assembler(tokenizer, rules, (5,))
        made = until_finished([assembler.push(TokenChunk(tuple(ids[at : at + size]))) for at in range(0, 8, size)])
        assert "".join(piece.text for piece in made) == "[CALL]a[CALL]"
        assert made[-1].stop_reason == "a a"
        assert [token for piece in made for token in piece.token_ids] == ids[:6]


# Tensors on the wire


@settings(deadline=None)
@example([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, 1e-40, 3.3e38, 3.4e38])  # ties, and the ends
@example([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, 1e-40, 3.3e38, 3.38e38])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=HIDDEN, max_size=HIDDEN))
def test_bfloat16_rounds_as_hardware_does(values: list[float]) -> None:
    with np.errstate(over="ignore"):
        reference = np.array(values, np.float32).astype(ml_dtypes.bfloat16)
    kind = wire.DATATYPES["BF16"]
    if not np.isfinite(reference.astype(np.float32)).all():
        with pytest.raises(InvalidTensorError):
            wire.from_numbers(kind, (1, HIDDEN), values)
        return
    tensor = wire.from_numbers(kind, (1, HIDDEN), values)
    assert tensor.data == reference.tobytes()
    np.testing.assert_array_equal(wire.numbers(tensor), reference.astype(np.float32))


@settings(deadline=None)
@example(b"\x01\x00\x80\x7f" * 4, "FP32")  # signalling NaNs: no warning either
@example(b"\x01\x00\x00\x00\x00\x00\xf0\x7f" * 2, "FP64")
@example(b"\x01\x7c" * 8, "FP16")
@given(st.binary(min_size=16, max_size=16), st.sampled_from(sorted(wire.DATATYPES)))
def test_finite_means_no_nan_and_no_inf(data: bytes, datatype: str) -> None:
    kind = wire.DATATYPES[datatype]
    dtype: Any = ml_dtypes.bfloat16 if datatype == "BF16" else kind.numpy
    with np.errstate(invalid="ignore"):  # casting a signalling NaN
        values = np.frombuffer(data, dtype).astype(np.float64)
    tensor = TensorData(kind.name, (1, len(values)), data)
    assert all_finite(tensor) == all(map(math.isfinite, values))


def test_bytes_are_not_copied() -> None:
    data = memoryview(bytes(1 + 4 * HIDDEN))[1:]
    tensor = wire.from_bytes(wire.DATATYPES["FP32"], (1, HIDDEN), data)
    assert tensor.data is data


def test_datatypes_are_one_to_one() -> None:
    assert {wire.DATATYPE_OF[kind.name]: kind for kind in wire.DATATYPES.values()} == wire.DATATYPES
    assert wire.checked_shape([3, HIDDEN], MODEL) == (3, HIDDEN)
