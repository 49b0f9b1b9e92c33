"""Log probabilities of tokens, in the forms that servers write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token and of the likeliest ones in its place, as `(text, logprob)`."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


def token_logprobs(found: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...] | None:
    """Of an answer, in both of OpenAI's forms: lists side by side for completions, a list of objects for chats."""
    if found is None:
        return None
    if found.get("content") is not None:
        return tuple(
            TokenLogprob(
                str(item["token"]),
                float(item["logprob"]),
                tuple((str(top["token"]), float(top["logprob"])) for top in item.get("top_logprobs") or ()),
            )
            for item in found["content"]
        )
    tokens = found.get("tokens") or ()
    tops = found.get("top_logprobs") or [{}] * len(tokens)
    return tuple(
        TokenLogprob(str(token), float(logprob), tuple((str(text), float(p)) for text, p in (top or {}).items()))
        for token, logprob, top in zip(tokens, found.get("token_logprobs") or (), tops, strict=True)
    )


def prompt_logprobs(found: Sequence[Mapping[str, Any] | None]) -> tuple[TokenLogprob | None, ...]:
    """Of a prompt, in vLLM's form: for each of its tokens a map from token ids, its own first, to logprob, rank
    and text; null for the first, which nothing predicts."""
    return tuple(None if not place else _of_prompt(list(place.values())) for place in found)


def _of_prompt(entries: Sequence[Mapping[str, Any]]) -> TokenLogprob:
    ranked = sorted(entries, key=lambda entry: entry.get("rank") or 0)
    own, top = entries[0], tuple((_text(entry), float(entry["logprob"])) for entry in ranked)
    return TokenLogprob(_text(own), float(own["logprob"]), top)


def _text(entry: Mapping[str, Any]) -> str:
    return str(entry.get("decoded_token") or "")
