"""A chat as the token ids of its prompt, trimmed where its mode says so, and the report of what was left out."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...runtime.errors import ContextLengthError, InvalidRequestError
from .modes import Chosen
from .options import MODE_HEADER
from .prompt_cache import Chat, ChatPrompts
from .trimming import trim

TRIMMED_HEADER = b"x-pimoe-trimmed-messages"

# Above this, rendering and encoding would hold the event loop for milliseconds.
_THREAD_FROM_CHARS = 16_384
# What a value takes to be rendered besides its characters, as a number of characters.
_VALUE_CHARS = 16
# No report is worth more than tens of milliseconds: longer texts than these are left uncounted.
_MAX_REPORTED_CHARS = 32_768
_TOO_MANY = 1 << 62


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat that is ready to be continued.

    Attributes:
        kept: indices of the messages that the prompt was made of.
        trimmed_tokens: of the texts of the messages left out, each by itself; None where too much of it was not
            counted before.
    """

    token_ids: list[int]
    messages: int
    kept: tuple[int, ...]
    trimmed_tokens: int | None = 0


@dataclass(frozen=True, slots=True)
class ModeReport:
    """What an answer says of its mode. The last three are None where there were no messages."""

    mode: str | None
    trimmed_messages: int | None = None
    trimmed_tokens: int | None = None
    kept_messages: int | None = None

    def body(self) -> dict[str, Any]:
        """The field `pimoe` of an answer."""
        if self.trimmed_messages is None:
            return {"mode": self.mode}
        return {
            "mode": self.mode,
            "trimmed_messages": self.trimmed_messages,
            "trimmed_tokens": self.trimmed_tokens,
            "kept_messages": self.kept_messages,
        }

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The same for who reads only the head of an answer."""
        found = [] if self.mode is None else [(MODE_HEADER, self.mode.encode())]
        if self.trimmed_messages is not None:
            found.append((TRIMMED_HEADER, str(self.trimmed_messages).encode()))
        return found


def report(chosen: Chosen | None, prompt: ChatPrompt | None = None) -> ModeReport | None:
    """What the answer has to say; None where the request asked for no mode and no truncation."""
    if chosen is None:
        return None
    if prompt is None:
        return ModeReport(chosen.name)
    kept = len(prompt.kept)
    return ModeReport(chosen.name, prompt.messages - kept, prompt.trimmed_tokens, kept)


async def chat_prompt(
    prompts: ChatPrompts,
    chat: Chat,
    chosen: Chosen | None,
    limits: tuple[int, int | None],
    whole: bool = True,
) -> ChatPrompt:
    """The prompt of a chat.

    Args:
        limits: the model's context in tokens, and the request's `max_tokens` if it names any.
        whole: all of the prompt must fit in the context; false where it is cut afterwards, or only counted.

    Raises:
        InvalidRequestError: the template refuses the messages, or makes nothing of them.
        ContextLengthError: the prompt is certain to be longer than the context.
    """
    if is_large((chat.messages, chat.variables)):
        made = await asyncio.to_thread(prepare, prompts, chat, chosen, limits, whole)
    else:
        made = prepare(prompts, chat, chosen, limits, whole)
    prompts.count_trimmed(made.messages - len(made.kept))
    return made


def is_large(value: object, limit: int = _THREAD_FROM_CHARS) -> bool:
    """Whether plain JSON takes long to render: all its strings count, keys too, and how many values there are. The
    time that this takes is bounded by `limit`."""
    left, waiting = limit, [value]
    while waiting:
        value = waiting.pop()
        inner: Collection[Any] = ()
        if isinstance(value, str):
            left -= len(value)
        elif isinstance(value, dict):
            left -= _VALUE_CHARS * len(value)
            inner = value.values() if left > 0 else ()
            left -= sum(map(len, value)) if left > 0 else 0
        elif isinstance(value, list | tuple):
            left -= _VALUE_CHARS * len(value)
            inner = value if left > 0 else ()
        for item in inner:
            if isinstance(item, str):  # as most are: no need to wait
                left -= len(item)
            elif item is not None:
                waiting.append(item)
        if left <= 0:
            return True
    return False


def prepare(
    prompts: ChatPrompts,
    chat: Chat,
    chosen: Chosen | None,
    limits: tuple[int, int | None],
    whole: bool = True,
) -> ChatPrompt:
    """`chat_prompt` in this thread."""
    messages = chat.messages
    context, max_tokens = limits
    kept = tuple(range(len(messages)))
    made: dict[tuple[int, ...], Sequence[int] | None] = {}
    if chosen is not None and chosen.trims:
        budget = chosen.preset.prompt_budget(context, max_tokens)

        def count(indices: tuple[int, ...]) -> int | None:
            try:
                ids = made[indices] = prompts.token_ids(_only(chat, indices), max(0, budget))
            except InvalidRequestError:
                return None
            return _TOO_MANY if ids is None else len(ids)

        kept = trim(messages, chosen.preset.newest_messages, budget, count)
    ids = made.get(kept) or _whole(prompts, _only(chat, kept), context, whole)
    left = set(range(len(messages))).difference(kept)
    texts = [said(messages[index]) for index in sorted(left)]
    return ChatPrompt(list(ids), len(messages), kept, prompts.text_tokens(texts, _MAX_REPORTED_CHARS))


def said(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, and what it calls tools with."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [_part(part) for part in content or ()]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        parts += [str(function.get("name") or ""), str(function.get("arguments") or "")]
    return "".join(parts)


def _part(part: object) -> str:
    return str(part.get("text") or "") if isinstance(part, Mapping) else ""


def _only(chat: Chat, indices: Sequence[int]) -> Chat:
    return replace(chat, messages=[chat.messages[index] for index in indices])


def _whole(prompts: ChatPrompts, chat: Chat, context: int, whole: bool) -> Sequence[int]:
    ids = prompts.token_ids(chat, context, whole)
    if ids is None:
        raise ContextLengthError(f"the messages are longer than the context of {context} tokens", "messages")
    if not ids:
        raise InvalidRequestError("the prompt has no tokens", "messages")
    return ids
