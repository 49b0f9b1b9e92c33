"""Text to token ids and back, and conversations to prompts. It imports no torch, as gateways use it too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import CheckpointError, InvalidRequestError
from .chat import ChatTemplate, load_chat_template
from .detokenizer import REPLACEMENT, ByteLevelDecoder, IncrementalDecoder, WindowDecoder, byte_alphabet


class Tokenizer:
    """A checkpoint's tokenizer; make one with `load`. Any thread may use it.

    Args:
        backend: from `tokenizer.json`.
        byte_level: whether its tokens spell bytes in GPT-2's alphabet.
        template: for conversations.
    """

    def __init__(self, backend: tokenizers.Tokenizer, byte_level: bool, template: ChatTemplate | None) -> None:
        self._backend = backend
        self._template = template
        self._special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._alphabet = byte_alphabet()
        self._byte_level = byte_level

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer in `tokenizer.json`, with the chat template beside it; None where there is no such file.

        Raises:
            CheckpointError: a file is there and malformed.
        """
        file = folder / "tokenizer.json"
        if not file.exists():
            return None
        decoder = _read_json(file).get("decoder") or {}
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file}: no tokenizer ({error})") from error
        # Both serve training; here they would cut prompts in silence.
        backend.no_truncation()
        backend.no_padding()
        config_file = folder / "tokenizer_config.json"
        config = _read_json(config_file) if config_file.exists() else {}
        return cls(backend, decoder.get("type") == "ByteLevel", load_chat_template(folder, config))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special and added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Pass `add_special_tokens=False` for what `render_chat` made: a template writes its
        special tokens itself."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], /) -> str:
        """The text of token ids, always equal to what `incremental` gives piece by piece. Special tokens and
        unknown ids give no text; bytes that are no character give U+FFFD."""
        text = self._backend.decode(list(token_ids), skip_special_tokens=True)
        if REPLACEMENT in text and not self._byte_level:
            # The library turns a whole run of byte tokens into U+FFFD for one bad byte; streaming cannot take back
            # the good characters before it.
            stream = self.incremental()
            return stream.push(token_ids) + stream.finish()
        return text

    def token_text(self, token_id: int, /) -> str:
        """One token as it reads in the middle of a text, special tokens by name; U+FFFD where it is no whole
        character, nothing for an unknown id."""
        once = self._backend.decode([token_id], skip_special_tokens=False)
        twice = self._backend.decode([token_id, token_id], skip_special_tokens=False)
        return once if self._byte_level else twice[len(once) :]

    def incremental(self, context: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder for one new sequence.

        Args:
            context: tokens that the sequence continues; their text is not repeated, but a first token such as
                "▁world" then keeps its space.
        """
        if self._byte_level:
            return ByteLevelDecoder(self._token_bytes)
        return WindowDecoder(self._backend.decode, self._has_text, context)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], /, variables: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt that the chat template makes of messages, up to where the model's answer begins.

        Args:
            messages: objects with `role` and `content`.
            variables: more of what the template reads, such as `tools`.

        Raises:
            InvalidRequestError: there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; send a prompt instead of messages", "messages"
            )
        return self._template.render(messages, variables)

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._special and self._backend.id_to_token(token_id) is not None

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        try:
            return bytes(self._alphabet[character] for character in token)
        except KeyError:  # an added token that is plain text
            return token.encode()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return value
