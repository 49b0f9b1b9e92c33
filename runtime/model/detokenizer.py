"""Token ids to text one token at a time, so that what is streamed adds up to what would be decoded at once.

Two ways. Byte-level tokenizers (GPT-2's alphabet: Qwen, OLMoE) spell every token as bytes, which an incremental
UTF-8 decoder takes one by one. For all others (SentencePiece style: Mixtral) a token's text depends on its
neighbours, so a window of the last few tokens is decoded again and the new end of its text is emitted (as in
Text Generation Inference and vLLM).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "�"
# A character has at most four bytes, and so at most four tokens; what stays incomplete for longer never completes.
_MAX_HELD_TOKENS = 16


class IncrementalDecoder(Protocol):
    """Decodes one sequence. Its texts, joined, are `Tokenizer.decode` of all the ids."""

    def push(self, token_ids: Sequence[int], /) -> str:
        """The text that these tokens complete; may be empty."""
        ...

    def finish(self) -> str:
        """What is still held back, with U+FFFD for bytes that never became a character."""
        ...


class ByteLevelDecoder:
    """For tokenizers whose tokens are bytes.

    Args:
        token_bytes: a token's bytes; empty for special tokens and unknown ids.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int], /) -> str:
        """See `IncrementalDecoder`."""
        return self._utf8.decode(b"".join(map(self._token_bytes, token_ids)))

    def finish(self) -> str:
        """See `IncrementalDecoder`."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For all other tokenizers.

    Args:
        decode: ids to text, context-dependent.
        has_text: False for special tokens and unknown ids, which are dropped.
        context: tokens before the sequence, whose text is not emitted; with them, the first token keeps the space
            that decoding strips from the beginning of a text.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], has_text: Callable[[int], bool], context: Sequence[int] = ()
    ) -> None:
        self._decode, self._has_text = decode, has_text
        self._window = [token for token in context if has_text(token)][-_MAX_HELD_TOKENS:]
        self._emitted_tokens = len(self._window)
        self._emitted_text = decode(self._window)

    def push(self, token_ids: Sequence[int], /) -> str:
        """See `IncrementalDecoder`."""
        return "".join(self._push(token) for token in token_ids if self._has_text(token))

    def finish(self) -> str:
        """See `IncrementalDecoder`."""
        return self._emit(self._decode(self._window))

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        incomplete = text.endswith(REPLACEMENT) or len(text) <= len(self._emitted_text)
        if incomplete and len(self._window) - self._emitted_tokens < _MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted_text) :]
        # What was emitted just now stays as context for the next tokens; what came before it is forgotten.
        self._window = self._window[self._emitted_tokens :]
        self._emitted_tokens = len(self._window)
        self._emitted_text = self._decode(self._window)
        return new


def byte_alphabet() -> dict[str, int]:
    """The visible character that byte-level tokenizers write for each byte (GPT-2's `bytes_to_unicode`)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}
