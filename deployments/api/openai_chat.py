"""A chat as its template takes it: messages, tools, and the variables that a body may set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...runtime.errors import InvalidRequestError
from .context import TextCodec
from .fields import Fields
from .openai_messages import read_messages
from .openai_tools import Tools, read_tools
from .prompt_cache import Chat

# The template gets these from elsewhere; a body must not set them behind the back of what checks them.
_RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"))
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat's body asks to be continued, and how the answer is to be read.

    Attributes:
        reasoning: is told, where the model's format sets it apart.
    """

    chat: Chat
    tools: Tools
    reasoning: bool = True


def read_conversation(fields: Fields, codec: TextCodec) -> Conversation:
    """The messages, tools and template variables of a body.

    Raises:
        InvalidRequestError: malformed, or not what the model's template can take.
    """
    messages = read_messages(fields, codec.chat_template)
    tools = read_tools(fields, codec)
    variables = {**_kwargs(fields), **_effort(fields, codec)}
    if tools.described:
        variables["tools"] = list(tools.described)
    continues = fields.flag("continue_final_message") or False
    begins = fields.flag("add_generation_prompt")
    if continues and begins:
        raise fields.wrong("add_generation_prompt", "false, or absent, where continue_final_message is true")
    if continues and not messages[-1]["content"].strip():
        raise fields.wrong("continue_final_message", "false where the last message has no text to go on with")
    if begins is False and not continues:
        variables["add_generation_prompt"] = False
    chat = Chat(messages, variables, continues, fields.flag("add_special_tokens") or False)
    return Conversation(chat, tools, fields.flag("include_reasoning") is not False)


def _kwargs(fields: Fields) -> dict[str, Any]:
    given = fields.child("chat_template_kwargs")
    for name in given.values:
        if name in _RESERVED:
            raise given.wrong(name, "absent here: the request has a field for it")
    return dict(given.values)


def _effort(fields: Fields, codec: TextCodec) -> dict[str, Any]:
    effort = fields.text("reasoning_effort")
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise fields.wrong("reasoning_effort", f"one of {', '.join(_EFFORTS)}")
    if "reasoning_effort" in codec.chat_variables:
        return {"reasoning_effort": effort}
    if effort == "none":
        return {}
    raise InvalidRequestError(
        f"reasoning_effort is not supported by this model's chat template (it is {effort!r}); leave it out",
        "reasoning_effort",
    )
