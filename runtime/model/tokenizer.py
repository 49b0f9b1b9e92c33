"""Text to token ids and back, and conversations to prompts. It imports no torch, as gateways use it too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import CheckpointError, InvalidRequestError
from .chat import ChatTemplate, load_chat_template
from .detokenizer import REPLACEMENT, ByteLevelDecoder, IncrementalDecoder, WindowDecoder, byte_alphabet
from .token_bounds import TokenBounds, token_bounds

# Batches here are of one text. In the library's pool of threads it would gain nothing, but wait for its turn
# behind long ones, and a fork of the process would be warned about.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# From this on, the library's calls for batches are used, which release the interpreter lock. They need less time
# too, but on the event loop a short text is done soonest where nobody else may take the lock meanwhile.
_RELEASE_FROM = 1024


class Tokenizer:
    """A checkpoint's tokenizer; make one with `load`. Any thread may use it.

    Args:
        backend: from `tokenizer.json`.
        byte_level: whether its tokens spell bytes in GPT-2's alphabet.
        template: for conversations.
        bounds: how many tokens a text has at least; None: not known.

    Attributes:
        special_token_ids: tokens that give no text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        byte_level: bool,
        template: ChatTemplate | None,
        bounds: TokenBounds | None = None,
    ) -> None:
        self._backend = backend
        self._bounds = bounds
        self._template = template
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: id for id, token in added.items()}
        self.special_token_ids = frozenset(id for id, token in added.items() if token.special)
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
        definition = _read_json(file)
        decoder = definition.get("decoder") or {}
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file}: no tokenizer ({error})") from error
        # Both serve training; here they would cut prompts in silence.
        backend.no_truncation()
        backend.no_padding()
        config_file = folder / "tokenizer_config.json"
        config = _read_json(config_file) if config_file.exists() else {}
        template = load_chat_template(folder, config)
        return cls(backend, decoder.get("type") == "ByteLevel", template, token_bounds(definition, backend))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special and added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str:
        """The text of the chat template; empty where there is none."""
        return "" if self._template is None else self._template.source

    @property
    def chat_variables(self) -> frozenset[str]:
        """The variables that the chat template reads."""
        return frozenset() if self._template is None else self._template.reads

    def added_token_id(self, piece: str, /) -> int | None:
        """The token added under that name, special or not, such as "<|im_end|>"; None where there is none."""
        return self._added.get(piece)

    def token_piece(self, token_id: int, /) -> str:
        """A token as the vocabulary spells it, such as "Ġworld"; empty for an unknown id."""
        return self._backend.id_to_token(token_id) or ""

    @property
    def chat_reads_clock(self) -> bool:
        """Whether the chat template asks for the time, so that a rendered chat must not be kept."""
        return self._template is not None and self._template.reads_clock

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Pass `add_special_tokens=False` for what `render_chat` made: a template writes its
        special tokens itself. Other threads go on while a long text is encoded."""
        if len(text) < _RELEASE_FROM:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def fewest_tokens(self, text: str, /) -> int:
        """A number of tokens that a text has at least, found without tokenizing it; 0 where that is not known."""
        return 0 if self._bounds is None else self._bounds.fewest_tokens(text)

    def decode(self, token_ids: Sequence[int], /, skip_special_tokens: bool = True) -> str:
        """The text of token ids, equal to what `incremental` gives piece by piece. Special tokens give no text, or
        their names; unknown ids give no text; bytes that are no character give U+FFFD."""
        text = self._decode(list(token_ids), skip_special_tokens)
        if not skip_special_tokens:
            return text
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
        return self._chat().render(messages, variables)

    def render_unfinished_chat(
        self, messages: Sequence[Mapping[str, Any]], /, variables: Mapping[str, Any] | None = None
    ) -> str:
        """As `render_chat`, up to the end of the last message's `content`, which the model is to go on with.

        Raises:
            InvalidRequestError: as `render_chat`, and where the end of the last message is not to be seen.
        """
        return self._chat().render_unfinished(messages, variables)

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; send a prompt instead of messages", "messages"
            )
        return self._template

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        if len(token_ids) < _RELEASE_FROM:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self.special_token_ids and self._backend.id_to_token(token_id) is not None

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self.special_token_ids:
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
