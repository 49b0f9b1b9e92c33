"""How many tokens a text has at least: never more than it has, whatever the stages of the tokenizer do to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.model.detokenizer import byte_alphabet
from pimoe.runtime.model.token_bounds import TokenBounds, token_bounds
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from("aeE \n\u0301\u0323\u0308각\u1100\u1161\u11a8ﷺᾂΣİ"), st.characters(codec="utf-8")
    ),
    max_size=40,
)


def byte_level(normalizer: Any = None, splits: Any = None, **added: bool) -> Backend:
    """Bytes, and an added token of seven characters, longer than any other."""
    backend = Backend(models.BPE(vocab={letter: at for at, letter in enumerate(byte_alphabet())}, merges=[]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([splits, last]) if splits is not None else last
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False, **added)])
    return backend


def characters(**settings: Any) -> Backend:
    """Two known characters and a token for whatever else there is."""
    return Backend(models.BPE(vocab={"<unk>": 0, "a": 1, "e": 2}, merges=[], unk_token="<unk>", **settings))


def unigram(byte_fallback: bool) -> Backend:
    pieces = [("<unk>", 0.0), ("a", -1.0), *((f"<0x{byte:02X}>", -2.0) for byte in range(256))]
    return Backend(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))


BOUNDED = {
    "plain": byte_level(),
    "nfc": byte_level(normalizers.NFC()),
    "nfkc": byte_level(normalizers.Sequence([normalizers.Lowercase(), normalizers.NFKC()])),
    "nfkd": byte_level(normalizers.NFKD()),
    "replace": byte_level(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "split": byte_level(splits=pre_tokenizers.Split(Regex("a+"), "isolated")),
    "strip": byte_level(lstrip=True, rstrip=True),
    "unknown": characters(),
    "unigram": unigram(byte_fallback=True),
}
UNBOUNDED = {
    "accents": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "shorter": byte_level(normalizers.Replace("aa", "a")),
    "pattern": byte_level(normalizers.Replace(Regex("a+"), "a")),
    "composed into what stands before": byte_level(normalizers.Replace("a", "\u0301")),
    "blanks": byte_level(splits=pre_tokenizers.WhitespaceSplit()),
    "removed": byte_level(splits=pre_tokenizers.Split(" ", "removed")),
    "unknown run": characters(fuse_unk=True),
    "no unknown": Backend(models.BPE(vocab={"a": 0}, merges=[])),
    "unigram": unigram(byte_fallback=False),
    "words": Backend(models.WordLevel(vocab={"<unk>": 0}, unk_token="<unk>")),
}


def bounds_of(backend: Backend) -> TokenBounds | None:
    return token_bounds(json.loads(backend.to_str()), backend)


@pytest.fixture(scope="module", params=list(BOUNDED))
def bounded(request: pytest.FixtureRequest) -> tuple[Backend, TokenBounds]:
    bounds = bounds_of(BOUNDED[request.param])
    assert bounds is not None
    return BOUNDED[request.param], bounds


@given(text=TEXT, end=st.integers(0, 2))
def test_no_text_has_fewer_tokens(bounded: tuple[Backend, TokenBounds], text: str, end: int) -> None:
    backend, bounds = bounded
    for longest in (bounds.longest_chars, 1):
        # With a longest token of one character the bound is close, and wrong first; added tokens are longer.
        close = TokenBounds(longest, bounds.composes, bounds.strips)
        whole = text + "<|end|>" * (end if longest > 1 else 0)
        if longest == 1 and "<" in whole:
            continue
        assert close.fewest_tokens(whole) <= len(backend.encode(whole).ids)


def test_it_is_the_length_over_the_longest_token() -> None:
    bounds = bounds_of(byte_level())
    assert bounds == TokenBounds(7)
    assert [bounds.fewest_tokens("a" * chars) for chars in (0, 1, 7, 8, 70)] == [0, 1, 1, 2, 10]


def test_what_is_composed_counts_less_and_ascii_does_not() -> None:
    bounds = bounds_of(byte_level(normalizers.NFC()))
    assert bounds == TokenBounds(7, composes=True)
    assert bounds.fewest_tokens("a" * 70) == bounds.fewest_tokens("a" * 70 + "é") == 10
    assert bounds.fewest_tokens("é" * 280) == 10


def test_blanks_that_a_token_takes_along_do_not_count() -> None:
    backend = byte_level(lstrip=True)
    bounds = bounds_of(backend)
    assert bounds == TokenBounds(7, strips=True)
    assert len(backend.encode(" " * 100 + "<|end|>").ids) == bounds.fewest_tokens(" " * 100 + "<|end|>") == 1


@pytest.mark.parametrize("backend", UNBOUNDED.values(), ids=list(UNBOUNDED))
def test_where_characters_can_vanish_there_is_no_bound(backend: Backend) -> None:
    assert bounds_of(backend) is None
