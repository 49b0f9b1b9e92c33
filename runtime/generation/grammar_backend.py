"""llguidance (https://github.com/guidance-ai/llguidance), for the engine and the process that tries grammars.

Without torch, which that process does not need.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ..errors import InvalidRequestError
from .grammar_source import GrammarKey, GrammarLimits, brief, grammar_of, parser_limits, refused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Of a thread that compiles: llguidance recurses, and a chain of a few thousand rules ends the process on a stack
# of the usual 8 MiB. Address space only; memory where it is used.
STACK_BYTES = 256 << 20

_END = "<|end of grammar|>"
# A walk into a grammar: so many tokens where there is a choice, so many in all, and so long (computing time).
_WALKS, _CHOICES, _TOKENS, _WALK_S = 6, 48, 1024, 0.15


def read_tokenizer(file: Path, vocab_size: int, end_tokens: tuple[int, ...]) -> LLTokenizer:
    """Takes 2 s for a vocabulary of 150,000.

    Args:
        vocab_size: of the model; its tokenizer may have fewer tokens.
        end_tokens: with any of them an answer may end where the grammar allows it.

    Raises:
        InvalidRequestError: llguidance is not installed, or does not understand the tokenizer.
    """
    try:
        import llguidance
    except ImportError as error:
        message = "structured output is not available here: pimoe[structured] is not installed"
        raise InvalidRequestError(message, "grammar") from error
    if not file.exists():
        raise InvalidRequestError(
            "structured output needs the model's tokenizer.json, which is missing", "grammar"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
        known = [token for token in end_tokens if backend.id_to_token(token) is not None]
        if not known:  # llguidance must have one; this one lies outside of the model's vocabulary
            backend.add_special_tokens([_END])
            known = [backend.get_vocab()[_END]]
        size = max(vocab_size, 1 + max(backend.get_vocab().values()))
        return llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=known)
    except Exception as error:  # both libraries raise plain Exception
        message = f"structured output cannot be had with this model's tokenizer: {brief(str(error))}"
        raise InvalidRequestError(message, "grammar") from error


def new_matcher(tokenizer: LLTokenizer, key: GrammarKey, limits: GrammarLimits) -> LLMatcher:
    """Compile a grammar. Nothing bounds how long this takes.

    Raises:
        InvalidRequestError: it is not accepted.
    """
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(tokenizer, grammar_of(key), log_level=0, limits=parser_limits(limits))
        first = matcher.deep_copy()
        # Some show only here that they are too complex. What is not used further may be in any state.
        if not matcher.is_error():
            first.compute_bitmask()
        why = matcher.get_error() or first.get_error()
    except ValueError as error:
        why = str(error)
    if why:
        raise refused(key.kind, brief(why))
    return matcher


def why_unusable(compile: Callable[[], LLMatcher], blank: NDArray[np.bool_]) -> str:
    """Walk a few ways into a grammar, since some fail only after their first tokens (an object of 1,500 optional
    properties does where they may come). What lies further in, or off these ways, is not seen.

    Args:
        compile: the grammar's matcher, at its beginning.
        blank: of `blank_tokens`.

    Returns:
        Why an answer cannot follow it; "" if none of the ways failed.
    """
    matcher = compile()
    for walk in range(_WALKS):
        if _walk(matcher.deep_copy(), walk, blank):
            # All copies draw on the same states of one lexer: it counts only if it fails alone, too.
            if why := _walk(compile(), walk, blank):
                return f"it is too complex to be followed: {brief(why)}"
            return ""
    return ""


def _walk(matcher: LLMatcher, walk: int, blank: NDArray[np.bool_]) -> str:
    """Why it failed, or ""."""
    numbers, ends, choices = random.Random(walk), time.thread_time() + _WALK_S, 0
    for _ in range(_TOKENS):
        if matcher.is_stopped() or choices >= _CHOICES or time.thread_time() > ends:
            break
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            break
        allowed = np.unpackbits(bits, count=len(blank), bitorder="little").view(np.bool_)
        text = np.flatnonzero(allowed & ~blank)
        if not len(text):
            break  # it may end here, or go on with blanks only
        choices += len(text) > 1
        matcher.consume_token(_choose(text, walk, numbers))
    return matcher.get_error()


def _choose(tokens: NDArray[np.int64], walk: int, numbers: random.Random) -> int:
    # Byte-level vocabularies begin with the characters, in order: the first one is a quote or so, and the last one
    # opens or closes an object.
    if walk < 2:
        return int(tokens[-walk])
    few = tokens[: numbers.choice((2, 64, len(tokens)))]
    return int(few[numbers.randrange(len(few))])


def blank_tokens(tokenizer: LLTokenizer) -> NDArray[np.bool_]:
    """Which tokens bring no walk further, `[vocab]`: blanks, special tokens and those that are no text."""
    blank = np.ones(tokenizer.vocab_size, dtype=np.bool_)
    for token in range(tokenizer.vocab_size):
        if not tokenizer.is_special_token(token):
            blank[token] = not tokenizer.decode_bytes([token]).strip()
    return blank
