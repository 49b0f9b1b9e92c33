"""How many tokens a text has at least, without tokenizing it: what cannot fit is refused for next to nothing.

The bound is a text's length over that of the vocabulary's longest token. It holds where no character can vanish on
the way, which depends on every stage of the tokenizer; where one is not known here, there is no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from .detokenizer import byte_alphabet

# Most characters that canonical composition makes one of: the longest canonical decomposition in Unicode.
_MAX_COMPOSED = 4
_KEEPING_NORMALIZERS = frozenset(("ByteLevel", "Lowercase", "NFD", "NFKD", "Prepend"))
_COMPOSING_NORMALIZERS = frozenset(("NFC", "NFKC"))
_KEEPING_PRE_TOKENIZERS = frozenset(("ByteLevel", "Digits", "FixedLength", "Metaspace", "UnicodeScripts"))


@dataclass(frozen=True, slots=True)
class TokenBounds:
    """What the bound needs to know of a tokenizer.

    Attributes:
        longest_chars: characters of the longest token, as the vocabulary spells it.
        composes: the text is normalised to composed characters, which are fewer.
        strips: some tokens take the blanks around them along, however many these are.
    """

    longest_chars: int
    composes: bool = False
    strips: bool = False

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of a text's tokens."""
        if self.strips:
            text = "".join(text.split())
        chars = len(text)
        if self.composes and not text.isascii():
            # ASCII characters begin what is composed, and are never taken into another one.
            chars = max(len(text.encode("ascii", "ignore")), chars // _MAX_COMPOSED)
        return -(-chars // self.longest_chars)


def token_bounds(definition: Mapping[str, Any], backend: tokenizers.Tokenizer) -> TokenBounds | None:
    """The bounds of a tokenizer; None where there is no telling.

    Args:
        definition: what `tokenizer.json` holds.
        backend: made from it.
    """
    normalizers = list(_flat(definition.get("normalizer"), "normalizers"))
    pre_tokenizers = list(_flat(definition.get("pre_tokenizer"), "pretokenizers"))
    model = definition.get("model") or {}
    pieces = _pieces(model)
    kinds = {stage.get("type") for stage in (*normalizers, *pre_tokenizers)}
    if not (
        all(map(_keeps_normalized, normalizers))
        and all(map(_keeps_split, pre_tokenizers))
        and _keeps_all(model, pieces, "ByteLevel" in kinds)
    ):
        return None
    added = backend.get_added_tokens_decoder().values()
    normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
    lengths = [*map(len, pieces), *(max(len(token.content), len(normalize(token.content))) for token in added)]
    return TokenBounds(
        longest_chars=max(1, *lengths),
        composes=any(stage.get("type") in _COMPOSING_NORMALIZERS for stage in normalizers),
        strips=any(token.lstrip or token.rstrip for token in added),
    )


def _flat(stage: Any, children: str) -> Iterable[Mapping[str, Any]]:
    """The stages of a sequence of them."""
    if not isinstance(stage, Mapping):
        return
    if stage.get("type") != "Sequence":
        yield stage
        return
    for child in stage.get(children) or ():
        yield from _flat(child, children)


def _keeps_normalized(stage: Mapping[str, Any]) -> bool:
    """Whether a normalizer gives no fewer characters, composition apart."""
    kind = stage.get("type")
    if kind != "Replace":
        return kind in _KEEPING_NORMALIZERS or kind in _COMPOSING_NORMALIZERS
    pattern, content = (stage.get("pattern") or {}).get("String"), stage.get("content")
    if not isinstance(pattern, str) or not isinstance(content, str):
        return False
    # What is put in must not be composed with what stands before it.
    return len(content) >= len(pattern) and (content.isascii() or set(content) == {"▁"})


def _keeps_split(stage: Mapping[str, Any]) -> bool:
    kind = stage.get("type")
    if kind in ("Split", "Punctuation"):
        return stage.get("behavior") != "Removed"
    return kind in _KEEPING_PRE_TOKENIZERS


def _pieces(model: Mapping[str, Any]) -> frozenset[str]:
    """The vocabulary of a model whose tokens spell the text; empty for other models."""
    vocabulary = model.get("vocab") or ()
    if model.get("type") == "Unigram":
        return frozenset(piece for piece, _ in vocabulary)
    return frozenset(vocabulary) if model.get("type") == "BPE" else frozenset()


def _keeps_all(model: Mapping[str, Any], pieces: frozenset[str], byte_level: bool) -> bool:
    """Whether every character gives a token or is in one: others may be dropped, or run together as unknown."""
    if byte_level and pieces.issuperset(byte_alphabet()):
        return True
    if model.get("byte_fallback") and pieces.issuperset(f"<0x{byte:02X}>" for byte in range(256)):
        return True
    return model.get("type") == "BPE" and model.get("unk_token") in pieces and not model.get("fuse_unk")
