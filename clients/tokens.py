"""Text to token ids and back, by the server's tokenizer, in the shapes of vLLM's `/tokenize` and `/detokenize`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .calls import Answer
from .errors import InvalidRequestError, ProtocolError
from .generate_options import Message, is_chat, json_request, prompt_fields
from .transport import HttpRequest


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text or a chat.

    Attributes:
        max_model_len: how many tokens prompt and answer may have together; None where the server does not say.
        token_strs: each token as the vocabulary spells it, where asked for.
    """

    token_ids: tuple[int, ...]
    max_model_len: int | None = None
    token_strs: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.token_ids)


def tokenize_request(prompt: str | Sequence[Message], model: str, options: Mapping[str, Any]) -> HttpRequest:
    """The request for the tokens of a text or of messages; options that are None are left out.

    Raises:
        InvalidRequestError: the prompt is neither, or something in it is no JSON.
    """
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise InvalidRequestError("what is to be tokenized must be text or messages", param="prompt")
    given = {name: value for name, value in options.items() if value is not None}
    return json_request("/tokenize", {"model": model, **prompt_fields(prompt), **given})


def detokenize_request(token_ids: Sequence[int], model: str) -> HttpRequest:
    """The request for the text of token ids.

    Raises:
        InvalidRequestError: one is no integer.
    """
    try:
        ids = [int(token) for token in token_ids]
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"token ids are integers: {error}", param="tokens") from error
    return json_request("/detokenize", {"model": model, "tokens": ids})


def read_tokens(answer: Answer) -> Tokens:
    """What `tokenize` gives.

    Raises:
        ProtocolError: the answer is of another kind.
    """
    try:
        found = json.loads(answer.body)
        strs, longest = found.get("token_strs"), found.get("max_model_len")
        ids = tuple(int(token) for token in found["tokens"])
        return Tokens(
            ids, None if longest is None else int(longest), None if strs is None else tuple(map(str, strs))
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ProtocolError(f"{answer.call} was answered with no tokens ({error!r})") from error


def read_text(answer: Answer) -> str:
    """What `detokenize` gives.

    Raises:
        ProtocolError: the answer is of another kind.
    """
    try:
        return str(json.loads(answer.body)["prompt"])
    except (LookupError, TypeError, ValueError) as error:
        raise ProtocolError(f"{answer.call} was answered with no text ({error!r})") from error
