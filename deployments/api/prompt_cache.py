"""Prompts of chats as token ids, and the counts of tokens that trimming asks for: exact, and remembered.

A chat is rendered by the checkpoint's template and then tokenized; both take longer the longer it is, and clients
send the whole conversation each time. What was made is kept in one LRU, bounded by entries and by bytes:

    what                key                                                     value
    a rendered chat     SHA-256 of its messages and variables as JSON, in the   its token ids
                        order that they came in, which templates can see
    a text              SHA-256 of its UTF-8                                    how many tokens it has

One cache belongs to one codec, so template and tokenizer are part of every key. A template that reads the clock is
rendered each time, and its text is looked up instead of its messages: the date in it must not be yesterday's.

Safe to use from several threads: long chats are tokenized in a thread of their own. Two of them that miss the same
entry at once both make it.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import orjson

from ...runtime.errors import ConfigurationError

Value: TypeAlias = "array[int] | int"
Messages = Sequence[Mapping[str, Any]]
Variables = Mapping[str, Any]

# What an entry takes besides its token ids: the key, the objects around both and their places in the map.
_ENTRY_BYTES = 300
_TOKEN_TYPE = "I"  # 32 bits: no vocabulary is larger
# More characters than this for each token are too many for any tokenizer.
_MAX_TOKEN_CHARS = 256


class ChatCodec(Protocol):
    """What of a tokenizer is needed here; see `TextCodec`."""

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def render_chat(self, messages: Messages, /, variables: Variables | None = None) -> str:
        """The prompt that the chat template makes."""
        ...

    def render_unfinished_chat(self, messages: Messages, /, variables: Variables | None = None) -> str:
        """The same up to the end of the last message, which is to be continued."""
        ...


@runtime_checkable
class MeasuringCodec(Protocol):
    """A tokenizer that knows how long its tokens are."""

    def fewest_tokens(self, text: str, /) -> int:
        """A number of tokens that the text has at least, found without tokenizing it."""
        ...


def cannot_fit(text: str, codec: object, max_tokens: int, whole: bool = True) -> bool:
    """Whether a text is certain to be too long, before time is spent on tokenizing it.

    Args:
        whole: all of it must fit in `max_tokens`; otherwise its length is only kept within reason.
    """
    if len(text) <= max_tokens:
        return False
    if len(text) > max_tokens * _MAX_TOKEN_CHARS:
        return True
    return whole and isinstance(codec, MeasuringCodec) and codec.fewest_tokens(text) > max_tokens


@dataclass(frozen=True, slots=True)
class Chat:
    """All that decides a chat's prompt, besides the codec.

    Attributes:
        variables: what the template reads besides the messages, such as `tools`.
        unfinished: the last message is to be continued, instead of a new one begun.
        special: the tokenizer adds its special tokens to those that the template writes.
    """

    messages: Messages
    variables: Variables | None = None
    unfinished: bool = False
    special: bool = False


@dataclass(frozen=True, slots=True)
class PromptCacheLimits:
    """Bounds of the cache.

    Attributes:
        max_entries: most entries; 0 keeps nothing.
        max_bytes: most memory, keys and overhead included; an entry above an eighth of it is not kept.

    Raises:
        ConfigurationError: one is no integer from 0.
    """

    max_entries: int = 4096
    max_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 0:
                raise ConfigurationError(f"{field.name} is {value!r}; it must be an integer from 0", field.name)


class PromptCacheStatistics(NamedTuple):
    """Look-ups and evictions since the start, and what is held now."""

    hits: int
    misses: int
    evicted: int
    entries: int
    bytes: int


class ChatStatistics(NamedTuple):
    """`PromptCacheStatistics`, how many chats were trimmed, and by how many messages in all."""

    hits: int
    misses: int
    evicted: int
    entries: int
    bytes: int
    trimmed_chats: int
    trimmed_messages: int


class PromptCache:
    """The LRU by itself: values by exact key."""

    def __init__(self, limits: PromptCacheLimits | None = None) -> None:
        self.limits = limits or PromptCacheLimits()
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, Value] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evicted = 0

    def get(self, key: bytes) -> Value | None:
        """What is held under a key; counts as a hit or a miss."""
        with self._lock:
            value = self._held.get(key)
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
                self._held.move_to_end(key)
            return value

    def put(self, key: bytes, value: Value) -> None:
        """Keeps a value, unless it is too large; the least recently used make room."""
        nbytes = _nbytes(value)
        with self._lock:
            if nbytes * 8 > self.limits.max_bytes or key in self._held:
                return
            self._held[key] = value
            self._bytes += nbytes
            while len(self._held) > self.limits.max_entries or self._bytes > self.limits.max_bytes:
                _, oldest = self._held.popitem(last=False)
                self._bytes -= _nbytes(oldest)
                self._evicted += 1

    def statistics(self) -> PromptCacheStatistics:
        """See `PromptCacheStatistics`."""
        with self._lock:
            held = len(self._held), self._bytes
            return PromptCacheStatistics(self._hits, self._misses, self._evicted, *held)


class ChatPrompts:
    """Chats as token ids, through a cache that belongs to one codec.

    Args:
        reads_clock: whether the chat template asks for the time; see the module.
    """

    def __init__(self, codec: ChatCodec, cache: PromptCache | None = None, reads_clock: bool = False) -> None:
        self._codec = codec
        self.reads_clock = reads_clock
        self.cache = cache or PromptCache()
        self._trimmed_chats = self._trimmed_messages = 0

    def token_ids(self, chat: Chat, max_tokens: int = sys.maxsize, whole: bool = True) -> Sequence[int] | None:
        """The token ids of a chat; None where it is certain to have more than `max_tokens` before it is tokenized
        (see `cannot_fit`). There may be more of them nevertheless.

        Raises:
            InvalidRequestError: the template refuses the messages.
        """

        def encode(text: str) -> list[int] | None:
            if cannot_fit(text, self._codec, max_tokens, whole):
                return None
            return self._codec.encode(text, add_special_tokens=chat.special)

        if self.reads_clock:
            text = self._render(chat)
            kind = b"R" if chat.special else b"r"
            return self._ids(_digest(kind, _utf8(text)), lambda: encode(text))
        return self._ids(_chat_key(chat), lambda: encode(self._render(chat)))

    def text_tokens(self, texts: Iterable[str], max_chars: int = sys.maxsize) -> int | None:
        """How many tokens texts have, each by itself and without special ones; None where more than `max_chars` of
        them would have to be tokenized now."""
        total = 0
        for text in texts:
            key = _digest(b"t", _utf8(text))
            found = self.cache.get(key)
            if not isinstance(found, int):
                max_chars -= len(text)
                if max_chars < 0:
                    return None
                found = len(self._codec.encode(text, add_special_tokens=False))
                self.cache.put(key, found)
            total += found
        return total

    def count_trimmed(self, messages: int) -> None:
        """Notes for the statistics that a chat was made shorter by `messages`; on the event loop's thread only."""
        if messages:
            self._trimmed_chats += 1
            self._trimmed_messages += messages

    def statistics(self) -> ChatStatistics:
        """See `ChatStatistics`."""
        return ChatStatistics(*self.cache.statistics(), self._trimmed_chats, self._trimmed_messages)

    def _ids(self, key: bytes | None, encode: Callable[[], list[int] | None]) -> array[int] | None:
        found = None if key is None else self.cache.get(key)
        if isinstance(found, array):
            return found
        made = encode()
        if made is None:
            return None
        ids = array(_TOKEN_TYPE, made)
        if key is not None:
            self.cache.put(key, ids)
        return ids

    def _render(self, chat: Chat) -> str:
        codec = self._codec
        render = codec.render_unfinished_chat if chat.unfinished else codec.render_chat
        return render(chat.messages, chat.variables) if chat.variables else render(chat.messages)


def _chat_key(chat: Chat) -> bytes | None:
    """None where it cannot be written exactly; then nothing is remembered."""
    try:
        return _digest(
            b"c", orjson.dumps([list(chat.messages), chat.variables or None, chat.unfinished, chat.special])
        )
    except TypeError:
        return None


def _digest(kind: bytes, data: bytes) -> bytes:
    return hashlib.sha256(kind + data).digest()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _nbytes(value: Value) -> int:
    return _ENTRY_BYTES + (len(value) * value.itemsize if isinstance(value, array) else 0)
